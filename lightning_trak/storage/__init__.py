"""Files and directories: written whole, checked when they are read."""
