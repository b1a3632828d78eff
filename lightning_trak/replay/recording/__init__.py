"""The files of a recorded run: what they hold, reading them, and writing them."""
