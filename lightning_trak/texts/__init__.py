"""Texts that people read: those of the user's data, made harmless, and small tables."""
