"""Notes the dataset positions of the batches that a loader draws, with any sampler and any number of workers."""

from __future__ import annotations

import copy
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader

from lightning_trak.compatibility import with_index_sampler
from lightning_trak.running.data.loaders import as_loader
from lightning_trak.running.data.loading import num_examples


class PositionLog:
    """The positions of the batches that were drawn and not trained on yet, in order.

    A loader with workers draws positions ahead of time, but gives batches in the order in which it drew them.
    """

    def __init__(self) -> None:
        self._drawn: deque[Sequence[int]] = deque()

    def watched(self, loader: Any) -> DataLoader[Any]:
        """A copy of a loader that notes what it draws here. It shares the dataset and the samplers.

        Raises:
            TypeError: if the data are not a DataLoader of a map-style dataset.
            ValueError: if the loader makes no batches, or may give them in another order than it draws them.
        """
        if not isinstance(loader, DataLoader):
            raise TypeError(
                f"TrainingRecorder needs one DataLoader for training, got a {type(loader).__name__}; join several"
                " datasets with a ConcatDataset"
            )
        if as_loader(loader, whole=False) is not loader:
            raise TypeError(
                f"TrainingRecorder cannot follow the order in which a {type(loader.dataset).__name__} gives its"
                " examples; train with a map-style dataset"
            )
        if not getattr(loader, "in_order", True):
            raise ValueError(
                "the loader has in_order=False, so it is not known which batch holds which examples; use in_order=True"
            )
        total = num_examples(loader)
        watched: DataLoader[Any] = with_index_sampler(copy.copy(loader), lambda sampler: _Watched(sampler, self, total))
        return watched

    def take(self) -> Sequence[int]:
        """The positions of the next batch.

        Raises:
            RuntimeError: if no batch was drawn.
        """
        if not self._drawn:
            raise RuntimeError(
                "a batch of training has no positions in the dataset: something replaced the Trainer's DataLoader"
                " after TrainingRecorder saw it; let the callbacks and hooks that replace it do so in setup"
            )
        return self._drawn.popleft()

    def begin(self) -> None:
        """Forget what an earlier pass over the data drew and did not use."""
        self._drawn.clear()

    def note(self, positions: Sequence[Any], total: int) -> None:
        """Note the positions of a batch that was drawn.

        Args:
            positions: what the sampler draws.
            total: the number of examples.

        Raises:
            ValueError: if these are not positions in the dataset.
        """
        try:
            drawn = array("q", positions)
        except (TypeError, OverflowError):
            drawn = array("q", [-1])
        if drawn and not (min(drawn) >= 0 and max(drawn) < total):
            raise ValueError(
                f"the loader's sampler draws {positions!r:.80}, which are not positions in the dataset of {total}"
                " examples; use a dataset with items 0, 1, ..., and a sampler that draws these numbers"
            )
        self._drawn.append(drawn)


class _Watched:
    """A batch sampler that notes what another one draws."""

    def __init__(self, sampler: Any, log: PositionLog, total: int) -> None:
        self._sampler, self._log, self._total = sampler, log, total

    def __iter__(self) -> Iterator[Any]:
        self._log.begin()
        for positions in self._sampler:
            self._log.note(positions, self._total)
            yield positions

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle ask for these before there is a sampler
            raise AttributeError(name)
        return getattr(self._sampler, name)
