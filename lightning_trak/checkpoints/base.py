"""A checkpoint, and the kinds of files and directories that hold checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lightning_trak.checkpoints.manifest import Snapshot, TensorFile
from lightning_trak.checkpoints.subsets import TrainingSubset
from lightning_trak.storage.files import tensor_digest


@dataclass(frozen=True)
class Checkpoint:
    """Weights that can be loaded when they are needed.

    Attributes:
        name: a short label for messages, such as the file's name.
        load: reads the state dict: name -> CPU tensor, under the names that were saved. Do not write into the tensors.
            It raises FileNotFoundError if the file no longer exists, ValueError if the file is damaged or can only be
            read with ``weights_only=False``, and TypeError if it holds something other than tensors.
        record: step, epoch and optimizer settings if this is a snapshot of a series; else None.
        subset: the training examples that the model has seen; None: all of them.
        live: whether these are the weights of a model in memory, which may change between two reads.
        read_file: reads another file of the series; None if this is not a snapshot of one.
        adapter: the settings of PEFT's adapter, if these are its weights alone; None if not.
        final: whether this is where its training ended: no later checkpoint of the same directory is known.
    """

    name: str
    load: Callable[[], dict[str, Tensor]]
    record: Snapshot | None = None
    subset: TrainingSubset | None = None
    live: bool = False
    read_file: Callable[[TensorFile], dict[str, Tensor]] | None = None
    adapter: Mapping[str, Any] | None = None
    final: bool = True

    @property
    def frozen(self) -> str | None:
        """The checksum of the parameters that it leaves out because they were frozen; None if it has all."""
        return None if self.record is None else self.record.frozen

    @property
    def partial(self) -> bool:
        """Whether it leaves out parameters, which are then those of the model."""
        return self.frozen is not None or self.adapter is not None

    def kept_preconditioner(self) -> TensorFile:
        """The file of what the optimizer multiplied gradients by.

        Raises:
            ValueError: if it was not kept.
        """
        found = None if self.record is None else self.record.preconditioner
        if found is None:
            raise ValueError(
                f"{self.name} comes without the preconditioner of its optimizer: train with"
                " TRAKCallback(..., preconditioner=True) or TRAKTrainerCallback(..., preconditioner=True), or use"
                " preconditioned=False"
            )
        return found

    def load_preconditioner(self) -> dict[str, Tensor]:
        """Read what the optimizer multiplied gradients by: canonical name of a parameter -> CPU tensor.

        Raises:
            FileNotFoundError: if the file no longer exists.
            ValueError: if it was not kept, or the file is damaged.
        """
        stored = self.kept_preconditioner()
        assert self.read_file is not None
        return self.read_file(stored)

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
