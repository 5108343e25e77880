"""Networks: what they cost, copies to try things on, runs that leave no trace, BatchNorm's statistics."""
