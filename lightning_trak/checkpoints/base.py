"""A checkpoint, and the kinds of files and directories that hold checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_trak.checkpoints.series import Snapshot
from lightning_trak.checkpoints.subsets import TrainingSubset
from lightning_trak.storage.files import tensor_digest


@dataclass(frozen=True)
class Checkpoint:
    """Weights that can be loaded when they are needed.

    Attributes:
        name: a short label for messages, such as the file's name.
        read: reads the state dict.
        record: step, epoch and optimizer settings if this is a snapshot of a series; else None.
        subset: the training examples that the model has seen; None: all of them.
        live: whether these are the weights of a model in memory, which may change between two reads.
    """

    name: str
    read: Callable[[], dict[str, Tensor]]
    record: Snapshot | None = None
    subset: TrainingSubset | None = None
    live: bool = False

    def load(self) -> dict[str, Tensor]:
        """Read the state dict: name -> CPU tensor, under the names that were saved. Do not write into the tensors.

        Raises:
            FileNotFoundError: if the file no longer exists.
            ValueError: if the file is damaged, or can only be read with ``weights_only=False``.
            TypeError: if the file holds something other than tensors.
        """
        return self.read()

    def fingerprint(self) -> str:
        """SHA-256 over sorted names, dtypes, shapes and bytes. Equal weights give the same in any kind of file."""
        weights = self.load()
        return self.record.sha256 if self.record else tensor_digest(weights)  # load() has checked a snapshot's sha256


class CheckpointFormat(ABC):
    """A kind of file or directory that holds weights.

    A subclass is used as soon as it is defined. The subclass that was defined last is asked first.
    """

    formats: ClassVar[list[type[CheckpointFormat]]] = []

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        CheckpointFormat.formats.insert(0, cls)

    @classmethod
    @abstractmethod
    def recognizes(cls, location: str) -> bool:
        """Whether a local path or URL looks like a checkpoint of this kind."""

    @classmethod
    @abstractmethod
    def find(cls, location: str, weights_only: bool) -> list[Checkpoint]:
        """List the checkpoints at a location, in order. No weights are loaded yet.

        Args:
            location: a local path or URL.
            weights_only: False lets files run code when they are read.

        Raises:
            FileNotFoundError: if the location does not exist.
            ValueError: if the location holds no checkpoints.
        """
