"""Computes a few stored examples again. A store is valid only as long as the model computes the same."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning_utilities.core.rank_zero import rank_zero_info

from lightning_trak.features.extractor import FeatureExtractor
from lightning_trak.features.rows import without
from lightning_trak.features.store import FeatureStore
from lightning_trak.features.store.examples import NotStorableError, pack, unpack
from lightning_trak.gradients.batch import ExampleBatch
from lightning_trak.outputs.base import close

TOLERANCE = 5e-3  # larger than rounding differences between devices or versions of libraries
_HALF_PRECISION = 0.05  # the same for outputs that were computed in half precision


def output_tolerance(store: FeatureStore) -> float:
    """By how much an output may differ from the stored one, relative to its size."""
    return TOLERANCE if store.precision in ("32-true", "64-true") else _HALF_PRECISION


def keep_examples(extractor: FeatureExtractor, store: FeatureStore, batch: Any, size: int) -> None:
    """Keep the first examples in the store, so that scoring can compute their outputs again.

    Args:
        extractor: gives the layout: which parts of the batch belong to single examples.
        store: the store.
        batch: the store's first examples, as the model gets them.
        size: the number of these examples.
    """
    try:
        store.write_examples(pack(ExampleBatch(batch, size, extractor.layout)))
    except NotStorableError as error:
        rank_zero_info(f"TRAK: the check of outputs before scoring will be skipped: {error}")


def keeps_examples(store: FeatureStore) -> bool:
    """Whether the store has its examples, or needs none because random data give other outputs each time."""
    return not store.repeatable or store.read_examples() is not None


def require_same_outputs(extractor: FeatureExtractor, store: FeatureStore, checkpoint: int) -> None:
    """Check that the model still gives the stored outputs for the stored examples.

    Args:
        extractor: the extractor at the checkpoint.
        store: the store, which has features of the checkpoint.
        checkpoint: the number of the checkpoint.

    Raises:
        ValueError: if the outputs differ.
    """
    packed = store.read_examples()
    if packed is None:
        return
    try:
        examples = unpack(packed)
    except NotStorableError as error:
        rank_zero_info(f"TRAK: the check of outputs before scoring is skipped: {error}")
        return
    examples = replace(examples, content=move_data_to_device(examples.content, extractor.model.device))
    outputs = extractor.outputs_alone(examples).cpu()
    kept = store.read(checkpoint, 0).outputs[: examples.size]
    skipped = [position for position in store.skipped_of(checkpoint, 0) if position < examples.size]
    outputs[skipped] = 0
    if not close(outputs, kept, max(TOLERANCE, extractor.engine.rounding)):
        raise ValueError(
            f'store "{store.directory}" was made when the model computed something else: the output of example 0'
            f" {extractor.model.places[checkpoint]} is {float(kept[0]):.6g} in the store, and {float(outputs[0]):.6g}"
            " now. Something has changed that the store's manifest does not record, such as a function in a library or"
            " a file that the model reads: undo the change, or use another directory"
        )


def require_as_before(
    extractor: FeatureExtractor,
    store: FeatureStore,
    place: tuple[int, int],
    batch: Any,
    positions: Sequence[int],
    made: Iterable[str],
) -> None:
    """Check, before shards are added, that a shard's examples still have their stored outputs and features.

    Args:
        extractor: the extractor at the checkpoint.
        store: the store that has the shard.
        place: the numbers of checkpoint and shard.
        batch: the shard's first examples, as the model gets them.
        positions: positions of these examples in the dataset.
        made: the names of the extras that the store had lost and that were made again.

    Raises:
        ValueError: if outputs or features differ.
    """
    found, stored = extractor(batch, torch.tensor(positions)), store.read_stored(*place)[: len(positions)]
    skipped = store.skipped_of(*place)
    found = without(found, torch.tensor([position in skipped for position in positions]))
    kept = stored.decode()
    tolerance = max(TOLERANCE, 4 * torch.finfo(kept.features.dtype).eps, extractor.engine.rounding)
    for name in ("outputs", "features"):
        before, now = getattr(kept, name).double(), getattr(found, name).cpu()
        error = (now.double() - before).norm()
        rounding = stored.dtype.rounding(now) if name == "features" else 0.0
        if not error <= tolerance * (before.norm() + (1 if name == "outputs" else 0)) + rounding:
            lost = f" The store had lost the {' and the '.join(made)}, which had to be made again." if made else ""
            raise ValueError(
                f'store "{store.directory}" was made with other code or other data: examples {positions[0]} to'
                f" {positions[-1]} now have other {name} {extractor.model.places[place[0]]}.{lost} Use another"
                f' directory, or delete its folder "{store.folder(place[0]).name}" and call featurize again'
            )
