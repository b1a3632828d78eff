"""The library's ways from a batch to features, as they are timed."""

from collections.abc import Callable

import torch

from benchmarks.models import Workload
from lightning_trak.checkpoints import resolve_checkpoints
from lightning_trak.features import EngineName, FeatureExtractor
from lightning_trak.projections import KroneckerProjection, Projection, SparseProjection
from lightning_trak.store import Features

K = 2048

SETTINGS: dict[str, tuple[EngineName, Projection]] = {
    "vmap + SparseProjection": ("functional", SparseProjection(K)),
    "hooks + SparseProjection": ("hooks", SparseProjection(K)),
    "hooks + KroneckerProjection": ("hooks", KroneckerProjection(16, 16)),
}


def featurizer(work: Workload, engine: EngineName, projection: Projection) -> Callable[[], Features]:
    """Makes the features of a workload's batch."""
    checkpoints = resolve_checkpoints([work.model.state_dict()])
    digests = [checkpoint.fingerprint() for checkpoint in checkpoints]
    extractor = FeatureExtractor(work.model, work.output, checkpoints, digests, projection, engine=engine)
    extractor.to_checkpoint(0, torch.device("cpu"))
    positions = torch.arange(work.size)
    return lambda: extractor(work.batch, positions)
