"""All that this package knows of a Trainer: its data, its ranks, its devices, and how to borrow it."""
