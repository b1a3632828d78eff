"""Runs the command line in this process."""

import sys

from lightning_trak.cli.commands import main
from tests.launch import ROOT

CONFIG = str(ROOT / "examples" / "digits.yaml")


def command_line(patch, *arguments):
    patch.setattr(sys, "argv", ["lightning-trak", *arguments])
    patch.setattr(sys, "path", list(sys.path))
    main()
