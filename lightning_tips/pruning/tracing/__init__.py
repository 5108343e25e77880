"""Which channels of which tensors belong together, seen by running a network with labels on its channels."""
