"""Refuses features that are not finite, and gives the reason."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_trak.features.rows import Features
from lightning_trak.running.data.loading import load
from lightning_trak.texts.messages import listed

if TYPE_CHECKING:
    from lightning_trak.features.model import ModelCopy


_NAMED = 20  # examples in a message


class NotFiniteError(ValueError):
    """Features of some examples are not finite.

    Args:
        message: which examples they are, and what to do.
        positions: their positions in the dataset, all of them.
        checkpoint: the number of a checkpoint at which that of the first one is not finite.

    Attributes:
        positions: as given.
        checkpoint: as given.
    """

    def __init__(self, message: str, positions: Sequence[int], checkpoint: int | None = None) -> None:
        super().__init__(message)
        self.positions = list(positions)
        self.checkpoint = checkpoint

    def explained(self, model: ModelCopy, loader: DataLoader[Any]) -> NotFiniteError:
        """The same error, with the reason that the model output gives for the first example, if there is one.

        Args:
            model: the model copy, at the checkpoint. It is moved to the CPU.
            loader: the loader whose dataset holds the example.
        """
        first = self.positions[0]
        (batch,) = load(loader, [[first]], one_worker=True)
        if self.checkpoint is not None:
            model.load(self.checkpoint, torch.device("cpu"))
        model.module.cpu().eval()
        try:
            with model.differentiable():
                reason = model.output.explain_nan(model.module, batch)
        except Exception as error:  # an error that the example causes is the best reason
            reason = f"{type(error).__name__}: {error}"
        if reason is None:
            return self
        return NotFiniteError(f"{self}. Example {first}: {reason}", self.positions, self.checkpoint)


@contextmanager
def explaining(model: ModelCopy, loader: DataLoader[Any]) -> Iterator[None]:
    """Add to a :class:`NotFiniteError` the reason that the model output gives. Not for sharded models.

    Args:
        model: the model copy.
        loader: the loader whose dataset holds the examples.
    """
    try:
        yield
    except NotFiniteError as error:
        if model.sharded:
            raise
        raise error.explained(model, loader) from error


def not_finite(rows: Features) -> Tensor:
    """Which rows are not finite, bool, shape ``(n,)``.

    Args:
        rows: features of some examples, on the CPU: on a device this would wait for the computation.
    """
    # The largest and the smallest element are NaN if any is. On a CPU they take much less time than a test of each.
    extremes = rows.features.amax(1), rows.features.amin(1)
    return ~torch.stack([column.isfinite() for column in (*extremes, *rows[1:])]).all(0)


def require_finite(rows: Features, positions: Tensor, where: str) -> None:
    """Check that features are finite. Pass rows on the CPU.

    Args:
        rows: features of some examples.
        positions: positions of the examples in the dataset, shape ``(n,)``.
        where: the name of the checkpoint in errors.

    Raises:
        NotFiniteError: if a feature or one of its scalars is not finite. The error names all such examples.
    """
    bad = not_finite(rows)
    if bad.any():
        found = positions[bad.cpu()].tolist()
        raise NotFiniteError(
            f"{named(found)} {where} {_are(found)} not finite ({describe(rows, bad)}): look for NaN or huge values in"
            f" {'this example' if len(found) == 1 else 'these examples'} or the weights, or use a dtype with a larger"
            " range",
            found,
        )


def named(positions: Sequence[int]) -> str:
    """The features of some examples, in words; of many, only the first are named."""
    if len(positions) == 1:
        return f"the feature of example {positions[0]}"
    return f"the features of {len(positions)} examples ({listed(list(map(str, positions)), _NAMED)})"


def _are(positions: Sequence[int]) -> str:
    return "is" if len(positions) == 1 else "are"


def describe(rows: Features, bad: Tensor) -> str:
    """The scalars of the first row that is not finite, and the dtype."""
    first = int(bad.nonzero()[0])
    values = ", ".join(f"{name} {float(getattr(rows, name)[first]):g}" for name in Features._fields[1:])
    return f"{values}; features are {rows.features.dtype}"


class NotFiniteExamples:
    """The examples of a training set whose features are not finite, at several checkpoints.

    Attributes:
        found: their positions at each checkpoint.
        about: at each checkpoint, what is not finite.
    """

    def __init__(self) -> None:
        self.found: dict[int, list[int]] = {}
        self.about: dict[int, str] = {}

    def add(self, checkpoint: int, positions: Sequence[int], about: str) -> None:
        """Add some examples at a checkpoint."""
        self.found.setdefault(checkpoint, []).extend(positions)
        self.about.setdefault(checkpoint, about)

    def update(self, other: NotFiniteExamples) -> None:
        """Add those that another process has found."""
        for checkpoint, positions in other.found.items():
            self.add(checkpoint, positions, other.about[checkpoint])

    def require_none(self, places: Sequence[str]) -> None:
        """Raise if there are any.

        Args:
            places: the names of the checkpoints in errors.

        Raises:
            NotFiniteError: naming all of them.
        """
        if not self.found:
            return
        parts = []
        for checkpoint in sorted(self.found):
            positions = sorted(self.found[checkpoint])
            parts.append(
                f"{named(positions)} {places[checkpoint]} {_are(positions)} not finite ({self.about[checkpoint]})"
            )
        every = sorted({position for positions in self.found.values() for position in positions})
        first = next(checkpoint for checkpoint in sorted(self.found) if every[0] in self.found[checkpoint])
        raise NotFiniteError(
            f"{'; '.join(parts)}: look for NaN or huge values in these examples or the weights, or use a dtype with a"
            ' larger range, or leave these examples out with featurize(on_nan="skip"); nothing of their shards was'
            " written, and other shards are kept",
            every,
            first,
        )
