"""The reverse pass through a recorded run: through all of it, through one step, and through the optimizer's update."""
