"""Everything that deals with a Trainer: its data, its ranks, its devices, and borrowing it."""
