"""A network without some of its residual blocks: found, ranked, taken out in place."""
