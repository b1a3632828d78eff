"""Which runs a Lightning checkpoint continues, by the states that callbacks have left in it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_trak.storage.files import tensor_digest


def runs_in(checkpoint: dict[str, Any], kind: str) -> list[str]:
    """The runs of all callbacks of a kind.

    Args:
        checkpoint: a Lightning checkpoint.
        kind: the start of their state keys.
    """
    states = checkpoint.get("callbacks", {})
    return [state["run"] for key, state in states.items() if key.startswith(kind) and "run" in state]


def run_from(step: int, state: Mapping[str, Tensor]) -> str:
    """The identifier of all runs that start from the same state.

    Args:
        step: the optimizer steps that the run has taken.
        state: the weights, and what else the run starts from.
    """
    return tensor_digest({"step": torch.tensor(step), **{f"state/{name}": tensor for name, tensor in state.items()}})[
        :32
    ]
