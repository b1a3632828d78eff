"""Random small models and data, and what every engine makes of them, against autograd one example at a time."""
