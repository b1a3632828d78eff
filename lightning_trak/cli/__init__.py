"""``lightning-trak``, the command line."""

from lightning_trak.cli.commands import main

__all__ = ["main"]
