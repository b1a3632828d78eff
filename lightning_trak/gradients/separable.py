"""Finds out whether the batches of a loader can be taken apart into examples, and loads these one by one if not."""

from typing import Any

from torch.utils.data import DataLoader, default_collate

from lightning_trak.fingerprints.digests import content_digest
from lightning_trak.gradients.batch import ExampleBatch, Layout, find_layout, infer_batch_size
from lightning_trak.running.data.content import FEW, spread
from lightning_trak.running.data.loading import LEAVES_OUT, batch_size_of, function_name, load, num_examples
from lightning_trak.running.data.singles import is_one_by_one, one_by_one
from lightning_trak.running.random_states import isolated_random_states


def separable(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A loader whose batches can be taken apart into examples.

    A collate function may join examples so that no tensor has a row for each of them: graphs become one large graph, or
    the examples are in the second dimension. Then each example is loaded as a batch of its own.

    Args:
        loader: the loader.

    Returns:
        The same loader, or one of :class:`~lightning_trak.running.data.singles.Singles`.

    Raises:
        ValueError: if the collate function leaves examples out.
    """
    if loader.collate_fn is default_collate or is_one_by_one(loader):
        return loader
    some = spread(num_examples(loader), FEW)  # a graph of one node does not show that it is a graph
    try:
        with isolated_random_states():
            two, three, several = load(loader, [[0, 0], [0, 0, 0], some], one_worker=True)
    except Exception:
        if batch_size_of(loader) != 1:
            raise
        return one_by_one(loader)  # the user never asks it to join examples
    layout = _layout(two, three)
    alone = batch_size_of(loader) == 1
    if not alone and content_digest(two) == content_digest(three):
        raise _leaves_out(loader, "makes the same batch of two examples as of three")
    if layout is None:
        return one_by_one(loader)
    if not alone and (found := infer_batch_size(several, layout)) < len(some):
        raise _leaves_out(loader, f"makes a batch of {found} examples of {len(some)}")
    try:
        ExampleBatch(several, len(some), layout).take([0])
    except (TypeError, ValueError):
        return one_by_one(loader)
    return loader


def _layout(two: Any, three: Any) -> Layout | None:
    """The kinds of the parts of batches of two and of three examples; None if no part has a row for each example."""
    try:
        layout = find_layout(two, three)
    except (TypeError, ValueError):
        return None
    return layout if "rows" in layout.values() or "items" in layout.values() else None


def _leaves_out(loader: DataLoader[Any], what: str) -> ValueError:
    return ValueError(
        f"the collate function {function_name(loader.collate_fn)} {what}: {LEAVES_OUT}; or use batch_size=1 if it takes"
        " one example alone"
    )
