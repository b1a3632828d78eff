"""What the scores of TRAK are made of: one Newton step for each training example."""
