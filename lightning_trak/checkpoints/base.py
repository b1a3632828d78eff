"""A checkpoint, and the kinds of files and directories that hold checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lightning_trak.checkpoints.series import Snapshot
from lightning_trak.storage.files import tensor_digest


@dataclass(frozen=True)
class Checkpoint:
    """Weights that can be loaded when they are needed.

    Attributes:
        name: short label for messages, such as the file's name.
        read: reads the state dict.
        record: step, epoch and optimizer settings, for a snapshot of a series.
    """

    name: str
    read: Callable[[], dict[str, Tensor]]
    record: Snapshot | None = None

    def load(self) -> dict[str, Tensor]:
        """Read the state dict: name -> CPU tensor, under the names that it was saved with. Do not write into it.

        Raises:
            FileNotFoundError: if the file is gone.
            ValueError: if it is damaged, or needs ``weights_only=False``.
            TypeError: if it holds something other than tensors.
        """
        return self.read()

    def fingerprint(self) -> str:
        """SHA-256 over sorted names, dtypes, shapes and bytes: equal for equal weights in any kind of file."""
        weights = self.load()
        return self.record.sha256 if self.record else tensor_digest(weights)  # load() has compared that of a snapshot


class CheckpointFormat(ABC):
    """A kind of file or directory that holds weights.

    A subclass is used as soon as it is defined. The one that was defined last is asked first.
    """

    formats: ClassVar[list[type[CheckpointFormat]]] = []

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        CheckpointFormat.formats.insert(0, cls)

    @classmethod
    @abstractmethod
    def recognizes(cls, location: str) -> bool:
        """Whether a local path or URL looks like one of this kind."""

    @classmethod
    @abstractmethod
    def find(cls, location: str, weights_only: bool) -> list[Checkpoint]:
        """The checkpoints there, in order, without loading weights yet.

        Args:
            location: a local path or URL.
            weights_only: False lets files run code when they are read.

        Raises:
            FileNotFoundError: if nothing is there.
            ValueError: if it holds no checkpoints.
        """
