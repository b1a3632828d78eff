"""What users would write, and run."""
