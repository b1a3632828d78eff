"""Finds out whether the batches of a loader can be taken apart into examples, and loads these one by one if not."""

from typing import Any

from torch.utils.data import DataLoader, default_collate

from lightning_trak.gradients.batch import find_layout
from lightning_trak.running.loading import LEAVES_OUT, batch_size_of, function_name, load, num_examples
from lightning_trak.running.random_states import isolated_random_states
from lightning_trak.running.singles import is_one_by_one, one_by_one


def separable(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A loader whose batches can be taken apart into examples.

    A collate function may join examples so that no tensor has a row for each of them: graphs become one large graph, or
    the examples are in the second dimension. Then each example is loaded as a batch of its own.

    Args:
        loader: the loader.

    Returns:
        The same loader, or one of :class:`~lightning_trak.running.singles.Singles`.

    Raises:
        ValueError: if the collate function gives the same batch for two examples as for three.
    """
    if loader.collate_fn is default_collate or is_one_by_one(loader):
        return loader
    last = num_examples(loader) - 1  # a second example, because a graph of one node does not show that it is one
    try:
        with isolated_random_states():
            probes = [[0, 0], [0, 0, 0], [last, last], [last, last, last]]
            two, three, *other = load(loader, probes, num_workers=min(1, loader.num_workers))
    except Exception:
        if batch_size_of(loader) != 1:
            raise
        return one_by_one(loader)  # the user never asks it to join examples
    try:
        layout = find_layout(two, three)
        find_layout(*other)
    except (TypeError, ValueError):
        return one_by_one(loader)
    if "rows" in layout.values() or "items" in layout.values():
        return loader
    if batch_size_of(loader) == 1:
        return one_by_one(loader)
    raise ValueError(
        f"the collate function {function_name(loader.collate_fn)} makes the same batch of two examples as of three:"
        f" {LEAVES_OUT}; or use batch_size=1 if it takes one example alone"
    )
