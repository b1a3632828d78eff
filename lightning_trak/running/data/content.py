"""Digests of a few items of a dataset, to recognize its content."""

import warnings
from typing import Any

from torch.utils.data import DataLoader

from lightning_trak.fingerprints.digests import content_digest
from lightning_trak.running.chunks import chunked
from lightning_trak.running.data.loading import load, num_examples
from lightning_trak.running.random_states import isolated_random_states

FEW = 8  # items that every call compares
MANY = 64  # items that a store compares


def fingerprint(loader: DataLoader[Any], what: str) -> str | None:
    """A digest of eight items spread over the dataset, as the loader collates them.

    If the loader has workers, they read the items. A dataset that opens files at first use must not open them in this
    process, because workers would inherit the open files.

    Args:
        loader: the loader.
        what: the name of the data in warnings.

    Returns:
        The digest. If the items differ when they are loaded again, as with random augmentation: None, with a warning.
    """
    digest = sample_digest(loader)
    if digest is None:
        warn_of_random_items(what)
    return digest


def warn_of_random_items(what: str) -> None:
    """Warn that items are not the same when they are loaded again.

    Args:
        what: the items' name, such as "the targets".
    """
    warnings.warn(
        f"items of {what} are not the same twice, perhaps because of random augmentation; what is computed of them will"
        " differ from run to run: give the data without random augmentation",
        stacklevel=4,
    )


def sample_digest(loader: DataLoader[Any]) -> str | None:
    """A digest of eight items spread over the dataset, as the loader collates them; None if a second load differs."""
    sample = spread(num_examples(loader), FEW)
    first, second = _digests(loader, [sample, sample])
    return first if first == second else None


def prefix_digests(loader: DataLoader[Any], count: int) -> list[str] | None:
    """Digests of some of the first items of a dataset, as the loader collates them; None if a second load differs.

    Args:
        loader: the loader.
        count: how many items are first.

    Returns:
        :func:`sample_digest` of a dataset that ends there, and a digest of :data:`MANY` items.
    """
    few, many = spread(count, FEW), spread(count, MANY)
    first, second, *more = _digests(loader, [few, few, *chunked(many, FEW)])
    return [first, content_digest(more)] if first == second else None


def spread(total: int, count: int) -> list[int]:
    """Positions spread over a dataset, with the first and the last; all of them if there are no more."""
    return sorted({position * (total - 1) // (count - 1) for position in range(count)})


def _digests(loader: DataLoader[Any], batches: list[list[int]]) -> list[str]:
    with isolated_random_states():
        return [content_digest(batch) for batch in load(loader, batches, one_worker=True)]
