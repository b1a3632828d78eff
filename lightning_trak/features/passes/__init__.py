"""Passes of ``trainer.predict`` over data: they fill a store, or make features of targets in memory."""
