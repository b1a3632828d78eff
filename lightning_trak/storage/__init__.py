"""Files and directories. A file is written as a whole, and checked when it is read."""
