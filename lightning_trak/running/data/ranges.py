"""Cuts a dataset into ranges of examples, and shares them out to the ranks.

Features and scores belong to positions in a dataset. So the loader's sampler, its shuffling and Lightning's distributed
sampler are not used. The dataset is cut into ranges, and each rank loads whole ranges, in order. A batch then holds the
same examples for any number of processes, so results are reproducible bit for bit.
"""

import random
from collections.abc import Collection, Iterator, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_trak.running.chunks import chunked
from lightning_trak.running.data.loading import batch_size_of, load
from lightning_trak.running.ranks import Ranks


class Range(NamedTuple):
    """Consecutive examples that one rank handles as a whole.

    Attributes:
        number: the number of the range, which is the number of the shard.
        examples: positions in the dataset.
        audited: the examples among them that are also loaded alone, before all others. Each such batch holds its
            example twice, because a collate function may need more than one example.
    """

    number: int
    examples: range
    audited: Sequence[int] = ()


class IndexedBatch(NamedTuple):
    """A batch with the positions of its examples.

    Attributes:
        number: the number of its range. None for an extra batch that only keeps this rank in step with the others.
        positions: positions in the dataset, int64, shape ``(batch,)``.
        batch: the result of the user's collate function.
        alone: whether it holds a single audited example, twice. The example is also part of another batch of the range.
    """

    number: int | None
    positions: Tensor
    batch: Any
    alone: bool = False


class Stop:
    """Tells the loaders that share it to end before their next range.

    Attributes:
        requested: whether the loaders must end.
    """

    def __init__(self) -> None:
        self.requested = False


class _Planned(NamedTuple):
    """A batch to load: the fields of :class:`IndexedBatch`, and whether a round begins with it, see ``_rounds``."""

    begins: bool
    number: int | None
    examples: Sequence[int]
    alone: bool


class RangeLoader:
    """Yields this rank's share of some ranges as :class:`IndexedBatch`.

    It is not a DataLoader, so Lightning neither re-creates it nor adds a distributed sampler.

    Args:
        loader: the loader that gives the dataset, collate function, workers and batch size.
        ranges: the ranges to load. Rank r takes a range if its number in ``turns`` is r modulo the world size.
        turns: one number per range.
        trainer: gives the rank and the world size, once its processes run.
        even: give every rank equally many batches, by adding batches whose number is None.
        stop: once it is requested, the present range is loaded to its end, and no further range is begun. With ``even``
            a request on one rank is enough: all ranks end before the same range.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        ranges: Sequence[Range],
        turns: Sequence[int],
        trainer: L.Trainer,
        even: bool,
        stop: Stop,
    ) -> None:
        self.loader = loader
        self.ranges = ranges
        self.turns = turns
        self.trainer = trainer
        self.even = even
        self.stop = stop

    def _own(self, rank: int) -> Iterator[Range]:
        for part, turn in zip(self.ranges, self.turns, strict=True):
            if turn % self.trainer.world_size == rank:
                yield part

    def _rounds(self) -> Iterator[tuple[Range | None, int, int]]:
        """Yield for each of this rank's ranges: the range, its number of audited examples, its number of batches.

        With ``even``, both numbers are the same on all ranks, and the range is None if this rank has no more.
        """
        size, rank = batch_size_of(self.loader), self.trainer.global_rank
        ranks = range(self.trainer.world_size) if self.even else range(rank, rank + 1)
        for parts in zip_longest(*map(self._own, ranks)):
            given = [part for part in parts if part is not None]
            audited = max(len(part.audited) for part in given)
            yield parts[ranks.index(rank)], audited, max(-(-len(part.examples) // size) for part in given)

    def _plan(self) -> Iterator[_Planned]:
        """This rank's batches, those that only keep it in step with the others included."""
        size = batch_size_of(self.loader)
        other = self.ranges[0].examples if self.ranges else range(0)
        for part, audited, length in self._rounds():
            for place in range(audited):
                if part is not None and place < len(part.audited):
                    yield _Planned(place == 0, part.number, [part.audited[place]] * 2, alone=True)
                else:
                    yield _Planned(place == 0, None, [other[0]] * 2, alone=True)
            for start in range(0, length * size, size):
                begins = start == 0 and not audited
                if part is not None and start < len(part.examples):
                    yield _Planned(begins, part.number, part.examples[start : start + size], alone=False)
                else:
                    yield _Planned(begins, None, other[: min(size, 2)], alone=False)

    def __len__(self) -> int:
        return sum(audited + length for _, audited, length in self._rounds())

    def __iter__(self) -> Iterator[IndexedBatch]:
        batches: Iterator[Any] | None = None  # has its own workers, which end with it
        for planned in self._plan():
            if planned.begins and self._stopped():
                return
            if batches is None:
                batches = iter(load(self.loader, (each.examples for each in self._plan())))
            yield IndexedBatch(planned.number, torch.tensor(planned.examples), next(batches), planned.alone)

    def _stopped(self) -> bool:
        requested = self.stop.requested
        return not Ranks.of(self.trainer).all_true(not requested) if self.even else requested


def batch_ranges(examples: range, size: int, audited: Collection[int] = ()) -> list[Range]:
    """Cut examples into ranges of ``size``, each one batch. The examples in ``audited`` are also loaded alone."""
    parts = enumerate(chunked(examples, size))
    return [Range(number, part, [i for i in part if i in audited]) for number, part in parts]


def draw_audited(examples: range, count: int, key: str) -> list[int]:
    """Draw examples at random, and return them in order.

    Args:
        examples: the examples to draw from.
        count: the number to draw. If there are no more examples than that, all are taken.
        key: the seed of the draw.
    """
    return sorted(random.Random(f"{key}/audit/{examples.start}").sample(examples, min(count, len(examples))))


def share_out(
    loader: DataLoader[Any],
    jobs: Sequence[Sequence[Range]],
    trainer: L.Trainer,
    even: bool = False,
    stop: Stop | None = None,
) -> list[RangeLoader]:
    """One loader per job (checkpoint). All ranges of all jobs are shared out evenly to the ranks.

    Args:
        loader: the user's loader.
        jobs: the ranges of each job.
        trainer: the Trainer whose ranks share the work.
        even: give every rank equally many batches in each job.
        stop: ends all loaders before their next range. They share it, each as ``loader.stop``.
    """
    loaders, dealt, stop = [], 0, stop or Stop()
    for ranges in jobs:
        loaders.append(RangeLoader(loader, ranges, range(dealt, dealt + len(ranges)), trainer, even, stop))
        dealt += len(ranges)
    return loaders
