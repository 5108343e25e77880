"""How important each channel is, by weights or by data, and how much a network suffers without some of them."""
