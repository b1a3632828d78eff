"""A digest of a few items of a dataset, which stands for its content."""

import warnings
from typing import Any, cast

from torch.utils.data import DataLoader

from lightning_trak.fingerprints.digests import content_digest
from lightning_trak.running.loading import load
from lightning_trak.running.random_states import isolated_random_states


def fingerprint(loader: DataLoader[Any]) -> str | None:
    """A digest of eight items spread over the dataset, as the loader collates them.

    The loader's workers read them, if it has workers. A dataset that opens files at first use must not open them in
    this process, since workers would inherit them.

    Returns:
        The digest, or None, with a warning, if the items are not the same twice, as under random augmentation.
    """
    digest = sample_digest(loader)
    if digest is None:
        warnings.warn(
            "items of the training data are not the same twice: is there random augmentation? Features will be those of"
            " whatever is drawn, and differ from run to run; give the data without it",
            stacklevel=3,
        )
    return digest


def sample_digest(loader: DataLoader[Any]) -> str | None:
    """A digest of eight items spread over the dataset, as the loader collates them; None if the next ones differ."""
    total = len(cast(Any, loader.dataset))
    sample = sorted({position * (total - 1) // 7 for position in range(8)})
    with isolated_random_states():
        twice = load(loader, [sample, sample], num_workers=min(1, loader.num_workers))
        first, second = map(content_digest, twice)
    return first if first == second else None
