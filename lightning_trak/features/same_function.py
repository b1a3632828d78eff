"""Computes a few stored examples again: a store is only valid while the model computes the same."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_trak.features.extractor import FeatureExtractor
from lightning_trak.features.store import FeatureStore
from lightning_trak.features.stored_examples import NotStorableError, pack, unpack
from lightning_trak.gradients.batch import ExampleBatch
from lightning_trak.outputs.base import close

TOLERANCE = 5e-3  # more than rounding on another device or by another library explains
_KEPT = "examples"


def keep_examples(extractor: FeatureExtractor, store: FeatureStore, batch: Any, size: int) -> None:
    """Keep the first examples in the store, so that scoring can compute their outputs again.

    Args:
        extractor: knows which parts of the batch belong to single examples.
        store: where they go.
        batch: the store's first examples, as the model gets them.
        size: their number.
    """
    try:
        store.write_extra(0, _KEPT, pack(ExampleBatch(batch, size, extractor.layout)), store.key)
    except NotStorableError as error:
        rank_zero_info(f"TRAK: outputs cannot be computed again when the store is scored: {error}")


def keeps_examples(store: FeatureStore) -> bool:
    """Whether the store has its examples, or needs none: random data have other outputs each time."""
    return not store.repeatable or store.read_extra(0, _KEPT, store.key) is not None


def require_same_outputs(extractor: FeatureExtractor, store: FeatureStore, checkpoint: int) -> None:
    """Check that the model still gives the stored examples their stored outputs.

    Args:
        extractor: at the checkpoint.
        store: with features of it.
        checkpoint: which.

    Raises:
        ValueError: if they have others.
    """
    packed = store.read_extra(0, _KEPT, store.key)
    if packed is None:
        return
    try:
        examples = unpack(packed)
    except NotStorableError as error:
        rank_zero_info(f"TRAK: outputs of the store's examples are not computed again: {error}")
        return
    examples = replace(examples, content=move_data_to_device(examples.content, extractor.model.device))
    outputs = extractor.outputs_alone(examples).cpu()
    kept = store.read(checkpoint, 0).outputs[: examples.size]
    if not close(outputs, kept, max(TOLERANCE, extractor.engine.rounding)):
        raise ValueError(
            f'store "{store.directory}" is of another function: example 0 has the output {float(kept[0]):.6g} there'
            f" {extractor.model.places[checkpoint]}, and {float(outputs[0]):.6g} now. Something has changed that the"
            " store's manifest does not tell, such as a function in a library or a file that the model reads: undo it,"
            " or use another directory"
        )


def require_as_before(
    extractor: FeatureExtractor,
    store: FeatureStore,
    place: tuple[int, int],
    batch: Any,
    positions: Sequence[int],
    made: Iterable[str],
) -> None:
    """Check that a shard's examples still have their stored outputs and features, before shards are added.

    Args:
        extractor: at the checkpoint.
        store: with the shard.
        place: the numbers of checkpoint and shard.
        batch: the shard's first examples, as the model gets them.
        positions: of them in the dataset.
        made: what was lost and has been made again.

    Raises:
        ValueError: if they have others.
    """
    found, kept = extractor(batch, torch.tensor(positions)), store.read(*place)
    tolerance = max(TOLERANCE, 4 * torch.finfo(kept.features.dtype).eps, extractor.engine.rounding)
    for name in ("outputs", "features"):
        before = getattr(kept, name)[: len(positions)].double()
        error = (getattr(found, name).cpu().double() - before).norm()
        if not error <= tolerance * (before.norm() + (1 if name == "outputs" else 0)):
            lost = f" It has lost the {' and the '.join(made)}, which had to be made again." if made else ""
            raise ValueError(
                f'store "{store.directory}" was made by other code or on other data: examples {positions[0]} to'
                f" {positions[-1]} have other {name} now {extractor.model.places[place[0]]}.{lost} Use another"
                f' directory, or delete the folder "checkpoint-{place[0]:04d}" in it and call featurize again'
            )
