"""Takes the features that a predict loop has made, and writes them to the store or keeps them in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from typing_extensions import override

from lightning_trak.features.finiteness import NotFiniteExamples, describe, not_finite, require_finite
from lightning_trak.features.rows import Features, StoredFeatures, without
from lightning_trak.features.store import FeatureStore
from lightning_trak.running.data.ranges import Stop
from lightning_trak.running.threads import compute_threads
from lightning_trak.running.transfer import HostCopy, Waiting, beside

_HOPELESS = 100  # examples
_DEVICE_BYTES = 1 << 28  # of a shard's features that a CUDA device keeps and rounds, in a fraction of a CPU's time


class Sink(Protocol):
    """Takes features."""

    def add(self, checkpoint: int, number: int, positions: Tensor, rows: Features, engine: str) -> bool:
        """Take rows that an engine has made: the examples at ``positions``, which are part of range ``number``.

        Returns:
            Whether rows of this engine are still accepted.
        """


class _Rounded(NamedTuple):
    """A shard to be written: its rows, None if it is left out, and the examples that are not finite."""

    rows: StoredFeatures | None
    not_finite: list[int]


class ShardWriter(Sink):
    """Collects rows until a shard is complete. Then it checks the shard, and writes it while the next one is computed.

    A shard with an example that is not finite is left out, or written with zeros for this example.

    Use it as a context manager, which waits for the last shard. An error in a shard is raised at the latest when the
    second shard after it begins.

    Args:
        store: the store to write to.
        skips: whether examples that are not finite are written as zeros.
        stop: is requested, unless it ``skips``, when none of the first hundred examples at a checkpoint is finite: then
            probably none is.

    Attributes:
        not_finite: the examples whose features are not finite.
    """

    def __init__(self, store: FeatureStore, skips: bool, stop: Stop) -> None:
        self.store = store
        self.not_finite = NotFiniteExamples()
        self._skips, self._stop = skips, stop
        self._finite: set[int] = set()  # checkpoints at which some example is finite
        self._parts: list[HostCopy | Waiting] = []
        self._writing: Future[None] | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._wait()

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    @override
    def add(self, checkpoint: int, number: int, positions: Tensor, rows: Features, engine: str) -> bool:
        shard = self.store.shard(number)
        if int(positions[0]) == shard.start:
            self._parts = []
            if engine in self.store.refuted_engines():
                return False
        rounds = self.store.rounds_features and len(shard) * rows.features[0].nbytes <= _DEVICE_BYTES
        self._parts.append(Waiting.of(rows) if rounds and rows.features.is_cuda else HostCopy.start(rows))
        if int(positions[-1]) == shard[-1]:
            self._wait()
            rounded = partial(self._rounded, checkpoint, number, self._parts)
            self._parts = []
            if rows.features.is_cpu and torch.get_num_threads() > 1:
                # Operations of two threads at once, each on several cores, would share these and wait for each other.
                with torch.inference_mode(False):  # quantizers keep tables, also for later
                    rounded = partial(_Rounded, *rounded())  # rounded here, so that the thread only writes
            # The thread ends with the shard. Its tensor operations start a pool of OpenMP threads, and while there are
            # more of these than cores, those of the main thread sleep after every operation instead of waiting.
            thread = compute_threads(1)
            self._writing = thread.submit(self._write, checkpoint, number, rounded, engine)
            thread.shutdown(wait=False)
        return True

    def _rounded(self, checkpoint: int, number: int, parts: list[HostCopy | Waiting]) -> _Rounded:
        with beside(parts[0].tensors[0].device):
            rows = Features.cat([Features(*part.wait()) for part in parts])
            return self._rounded_rows(checkpoint, number, rows)

    def _rounded_rows(self, checkpoint: int, number: int, rows: Features) -> _Rounded:
        shard = self.store.shard(number)
        bad = not_finite(rows)
        if not bad.all():
            self._finite.add(checkpoint)
        positions = [shard[row] for row in bad.nonzero().flatten().tolist()]
        if positions:
            self.not_finite.add(checkpoint, positions, describe(rows, bad))
            if not self._skips:
                if checkpoint not in self._finite and len(self.not_finite.found[checkpoint]) >= _HOPELESS:
                    self._stop.requested = True
                return _Rounded(None, positions)
            rows = without(rows, bad)
        return _Rounded(self.store.round(checkpoint, number, rows), positions)

    def _write(self, checkpoint: int, number: int, rounded: Callable[[], _Rounded], engine: str) -> None:
        rows, left_out = rounded()
        if rows is not None:
            self.store.settle_engine(engine)
            self.store.save(checkpoint, number, rows, engine, left_out)


class FeatureBuffer(Sink):
    """Keeps rows in memory.

    Args:
        places: the names of the checkpoints in errors.
    """

    def __init__(self, places: Sequence[str]) -> None:
        self._places = places
        self._copies: list[list[tuple[Tensor, HostCopy]]] = [[] for _ in places]

    @override
    def add(self, checkpoint: int, number: int, positions: Tensor, rows: Features, engine: str) -> bool:
        self._copies[checkpoint].append((positions, HostCopy.start(rows)))
        return True

    def take(self, checkpoint: int) -> list[tuple[Tensor, Features]]:
        """Return the positions and rows of a checkpoint, and drop them from the buffer.

        Raises:
            ValueError: if a row is not finite.
        """
        copies, self._copies[checkpoint] = self._copies[checkpoint], []
        found = []
        for positions, copy in copies:
            rows = Features(*copy.wait())
            require_finite(rows, positions, self._places[checkpoint])
            found.append((positions, rows))
        return found
