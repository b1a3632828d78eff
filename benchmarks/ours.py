"""The settings of this package that are timed, from a batch to features."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.models import Precision, Workload
from lightning_trak.checkpoints.reading import resolve_checkpoints
from lightning_trak.features.dtypes import feature_dtype
from lightning_trak.features.engines import EngineName, make_engine
from lightning_trak.features.extractor import FeatureExtractor
from lightning_trak.features.model import ModelCopy
from lightning_trak.features.rows import Features
from lightning_trak.features.store.identity import Contents
from lightning_trak.projections import KroneckerProjection, Projection, SparseProjection

K = 2048


class Setting(NamedTuple):
    """How features are made."""

    engine: EngineName
    projection: Projection
    precision: Precision = "32-true"


def settings(k: int = K) -> dict[str, Setting]:
    """The settings that are timed, by name."""
    sparse, kronecker = SparseProjection(k), KroneckerProjection(16, 16)
    return {
        "vmap + SparseProjection": Setting("functional", sparse),
        "hooks + SparseProjection": Setting("hooks", sparse),
        "hooks + KroneckerProjection": Setting("hooks", kronecker),
        "hooks + SparseProjection, bf16-mixed": Setting("hooks", sparse, "bf16-mixed"),
        "hooks + KroneckerProjection, bf16-mixed": Setting("hooks", kronecker, "bf16-mixed"),
        "hooks + SparseProjection, bf16-true": Setting("hooks", sparse, "bf16-true"),
        "hooks + KroneckerProjection, bf16-true": Setting("hooks", kronecker, "bf16-true"),
    }


def extractor_of(work: Workload, setting: Setting) -> FeatureExtractor:
    """An extractor for the model of a workload, on the model's device."""
    device = next(work.model.parameters()).device
    checkpoints = resolve_checkpoints([work.model.state_dict()])
    digests = [content.digest for content in Contents(checkpoints).read()]
    work = work.to(device, setting.precision)
    model = ModelCopy(work.model, work.output, checkpoints, digests)
    model.load(0, device)
    bound = setting.projection.bind(model.shapes, seed=0, checkpoint=0, device=device)
    return FeatureExtractor(model, make_engine(setting.engine, model, work.autocast), bound, feature_dtype("float32"))


def featurizer(work: Workload, setting: Setting) -> Callable[[], Features]:
    """A function that makes the features of a workload's batch, on the device of its model."""
    work = work.to(next(work.model.parameters()).device, setting.precision)
    extractor, positions = extractor_of(work, setting), torch.arange(work.size)
    return lambda: extractor(work.batch, positions)
