"""Methods over stored gradient features: TRAK with and without a projection, and products of gradients."""
