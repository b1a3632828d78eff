"""What the strongest proponents of a target do to it: training without them, or one more step on them."""
