"""What is checked before and beside long work: the output, the loss, and whether a store is still of this model."""
