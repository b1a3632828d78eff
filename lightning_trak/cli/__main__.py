"""``python -m lightning_trak.cli``."""

from lightning_trak.cli.commands import main

main()
