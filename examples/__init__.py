"""Examples: code as users would write and run it."""
