"""A digest of a few items of a dataset, to recognize its content."""

import warnings
from typing import Any, cast

from torch.utils.data import DataLoader

from lightning_trak.fingerprints.digests import content_digest
from lightning_trak.running.loading import load
from lightning_trak.running.random_states import isolated_random_states


def fingerprint(loader: DataLoader[Any]) -> str | None:
    """A digest of eight items spread over the dataset, as the loader collates them.

    If the loader has workers, they read the items. A dataset that opens files at first use must not open them in this
    process, because workers would inherit the open files.

    Returns:
        The digest. If the items differ when they are loaded again, as with random augmentation: None, with a warning.
    """
    digest = sample_digest(loader)
    if digest is None:
        warnings.warn(
            "items of the training data are not the same twice, perhaps because of random augmentation; their features"
            " will differ from run to run: give the data without random augmentation",
            stacklevel=3,
        )
    return digest


def sample_digest(loader: DataLoader[Any], count: int | None = None) -> str | None:
    """A digest of eight items spread over the dataset, as the loader collates them; None if a second load differs.

    Args:
        loader: the loader.
        count: take only so many of the first items to be the dataset.
    """
    total = len(cast(Any, loader.dataset)) if count is None else count
    sample = sorted({position * (total - 1) // 7 for position in range(8)})
    with isolated_random_states():
        twice = load(loader, [sample, sample], num_workers=min(1, loader.num_workers))
        first, second = map(content_digest, twice)
    return first if first == second else None
