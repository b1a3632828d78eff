"""Whether data are those that a store was made of."""

from typing import Any

from torch.utils.data import DataLoader

from lightning_trak.features.store import FeatureStore
from lightning_trak.running.data.content import sample_digest
from lightning_trak.running.data.loading import num_examples


def require_stored_data(loader: DataLoader[Any], store: FeatureStore, user: str) -> None:
    """Check that a loader has the training data of a store, by their number and eight items.

    Args:
        loader: the loader.
        store: the store.
        user: what needs the data, for errors.

    Raises:
        ValueError: if they are other data, or they were not the same twice.
    """
    count = num_examples(loader)
    if count != store.num_examples:
        raise ValueError(
            f'{user} needs the training data of store "{store.directory}", which has {store.num_examples} examples; the'
            f" data given have {count}"
        )
    if store.data is None:
        raise ValueError(
            f'store "{store.directory}" was made of items that are not the same twice, perhaps because of random'
            f" augmentation. {user} would see other items: featurize without random augmentation"
        )
    if sample_digest(loader) != store.data:
        raise ValueError(
            f'{user} needs the training data of store "{store.directory}", but some items of the data given are'
            " others: pass the same data as to featurize, in the same order"
        )
