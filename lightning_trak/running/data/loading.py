"""Loads chosen examples of a dataset in the way of the user's loader."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from lightning_trak.running.chunks import chunked
from lightning_trak.running.data.loaders import DEFAULT_BATCH_SIZE, like

LEAVES_OUT = (
    "scores belong to positions in the dataset, so the collate function must not leave examples out. Take them out of"
    " the dataset, as with torch.utils.data.Subset(dataset, positions)"
)


def num_examples(loader: DataLoader[Any]) -> int:
    """The number of examples in the loader's dataset."""
    return len(cast(Any, loader.dataset))


def batch_size_of(loader: DataLoader[Any]) -> int:
    """The loader's batch size, or 32 if its batch sampler has no fixed size."""
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    return size if isinstance(size, int) and size > 0 else DEFAULT_BATCH_SIZE


class _Batches(Sampler[list[int]]):
    """Yields lists of positions, each made when it is needed."""

    def __init__(self, batches: Iterable[Sequence[int]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return (list(batch) for batch in self.batches)


def load(
    loader: DataLoader[Any],
    batches: Iterable[Sequence[int]],
    one_worker: bool = False,
    collate_fn: Callable[[list[Any]], Any] | None = None,
) -> DataLoader[Any]:
    """A loader with the settings of the given one that yields exactly these batches of dataset positions.

    Args:
        loader: the loader.
        batches: the positions in each batch.
        one_worker: whether one worker is enough, as for few batches. If the loader has workers, this process loads
            nothing itself: a dataset that opens files at first use must not open them before workers are forked.
        collate_fn: takes the place of the loader's.

    Raises:
        ValueError: if examples hold lists or objects that the default collate function does not stack. While batches
            are loaded: if the collate function fails and an example is None.
    """
    if (collate_fn or loader.collate_fn) is default_collate and not isinstance(loader.dataset, Dataset):
        _require_batchable(loader.dataset[0])
    return like(
        loader,
        loader.dataset,
        batch_sampler=_Batches(batches),
        num_workers=min(1, loader.num_workers) if one_worker else loader.num_workers,
        collate_fn=_Collate(collate_fn or loader.collate_fn),
        generator=torch.Generator(),  # the workers' base seed must not come from the user's random state
    )


class _Collate:
    """A collate function that explains an error of another one."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self._collate = collate

    def __call__(self, items: list[Any]) -> Any:
        try:
            return self._collate(items)
        except Exception as error:
            if not any(item is None for item in items):
                raise
            raise ValueError(
                f"the dataset gives None in place of an example, and {function_name(self._collate)}, its collate"
                f" function, fails: {type(error).__name__}: {error}. If it leaves such examples out: {LEAVES_OUT}"
            ) from error


def function_name(function: object) -> str:
    """The name of a function, or of the class of a callable object."""
    return getattr(function, "__qualname__", type(function).__name__)


def _require_batchable(example: Any) -> None:
    """Check that the default collate function makes of each column of an example what a model expects.

    A list in it becomes a list of batches, one for each element, and an image is refused.
    """
    if not isinstance(example, Mapping):
        return
    for name, value in example.items():
        if fault := _not_stacked(value):
            raise ValueError(
                f"{name!r} of an example is {fault}: pass a DataLoader with a collate_fn, such as a data collator of"
                ' Hugging Face, which also pads; or, if all have one shape, dataset.with_format("torch")'
            )


def _not_stacked(value: Any) -> str | None:
    """What the value is, and why the default collate function does not stack such values; None if it does."""
    if isinstance(value, list) and value and isinstance(value[0], (int, float, list)):
        kind = f"a list of {len(value)} {type(value[0]).__name__}s"
        return f"{kind}, and the default collate function would not stack such lists"
    try:
        default_collate([value])
    except TypeError:
        return f"a {type(value).__name__}, and the default collate function does not take such objects"
    return None


def sample_batches(loader: DataLoader[Any], count: int, key: str, total: int | None = None) -> list[list[int]]:
    """Positions of a uniform sample of a loader's dataset, without replacement, in batches of the loader's size.

    Args:
        loader: the loader.
        count: the size of the sample. If there are no more items, all are taken, in a random order.
        key: the seed of the sample.
        total: how many of the first items to draw from; None: all.
    """
    total = num_examples(loader) if total is None else total
    sample = random.Random(key).sample(range(total), min(count, total))
    return chunked(sample, batch_size_of(loader))
