"""A network with fewer filters: what goes, tried on a copy, and then cut in place."""
