"""`lightning-tips prune`: a trained checkpoint made smaller, compared with what it was, and exported."""
