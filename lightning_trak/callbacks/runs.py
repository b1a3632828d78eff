"""Which run a callback writes for, and which runs a Lightning checkpoint continues."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_trak.storage.files import tensor_digest


class RunCallback(Callback):
    """Base of callbacks whose directory belongs to one run. Lightning's checkpoints say which."""

    def __init__(self) -> None:
        self._run: str | None = None
        self._resumed_runs: list[str] = []

    @override
    def state_dict(self) -> dict[str, Any]:
        """The run that the directory belongs to. It is saved in Lightning checkpoints."""
        return {"run": self._run} if self._run else {}

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note which runs of this kind the checkpoint continues. Their directories and settings do not matter."""
        states, kind = checkpoint.get("callbacks", {}), type(self).__qualname__
        self._resumed_runs = [state["run"] for key, state in states.items() if key.startswith(kind) and "run" in state]


def run_from(step: int, state: Mapping[str, Tensor]) -> str:
    """The identifier of all runs that start from the same state.

    Args:
        step: the optimizer steps that the run has taken.
        state: the weights, and what else the run starts from.
    """
    return tensor_digest({"step": torch.tensor(step), **{f"state/{name}": tensor for name, tensor in state.items()}})[
        :32
    ]
