"""Everything that deals with a Trainer: its data, its ranks, its devices, and how it is borrowed."""
