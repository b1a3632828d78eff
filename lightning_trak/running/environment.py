"""Versions and hardware, which decide how computations are rounded."""

import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lightning_trak.version import __version__


def environment_of(trainer: L.Trainer) -> dict[str, Any]:
    """Versions and hardware, which decide whether a repeated run has the same bits."""
    return {
        "lightning_trak": __version__,
        "lightning": L.__version__,
        **rounding_of(trainer.strategy.root_device),
        "world_size": trainer.world_size,
        "threads": torch.get_num_threads(),
    }


def rounding_of(device: torch.device) -> dict[str, Any]:
    """What decides how a device rounds, other than the number of threads: in JSON's types."""
    return {
        "torch": torch.__version__,
        "device": device.type,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def _processor() -> str:
    """The model of the processor. Python's own functions know it on few systems."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
