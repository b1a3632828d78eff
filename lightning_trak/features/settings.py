"""The settings that features depend on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lightning_trak.checks import integer, is_integer, require_one_of
from lightning_trak.features.dtypes import FeatureDtype, default_dtype
from lightning_trak.features.engines import ENGINES, EngineName
from lightning_trak.projections import Projection
from lightning_trak.running.data.ranges import draw_audited


@dataclass(frozen=True)
class FeatureSettings:
    """How features are made.

    Attributes:
        projection: the projection that compresses gradients to k numbers.
        engine: how gradients are computed: ``"hooks"``, ``"functional"`` (vmap), ``"loop"``, or ``"auto"``, see
            :func:`~lightning_trak.features.engines.choose_engine`.
        seed: seed of the projection and of the choice of audited examples.
        dtype: how features are stored; None: :func:`~lightning_trak.features.dtypes.default_dtype` of their number.
        audit: how many examples of each shard are differentiated again, alone, by plain autograd.
        preconditioned: whether gradients of training examples are multiplied by what the optimizer multiplies them by.
            Those of targets are not.

    Raises:
        TypeError: if a setting is of another type.
        ValueError: if a setting is out of range.
    """

    projection: Projection
    engine: EngineName
    seed: int
    dtype: FeatureDtype | None
    audit: int
    preconditioned: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.projection, Projection):
            raise TypeError(
                f"expected projection as an object such as SparseProjection(8192), got {self.projection!r}: import its"
                " class from lightning_trak.projections"
            )
        if self.preconditioned and self.projection.sample_size:
            raise ValueError(
                f"{type(self.projection).__name__} is fitted to gradients that are not preconditioned: use"
                " SparseProjection, or preconditioned=False"
            )
        require_one_of("engine", self.engine, ("auto", *ENGINES))
        if not is_integer(self.audit) or self.audit < 0:
            raise ValueError(f"audit must be a number of examples, 0 for none, got {self.audit!r}")
        for name in ("seed", "audit"):  # one of NumPy's integers could not be written to the manifest
            object.__setattr__(self, name, integer(name, getattr(self, name)))

    def dim(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """The number of features of gradients with these shapes, by name."""
        return self.projection.bind(shapes, self.seed, checkpoint=0, device=torch.device("cpu")).dim

    def stored_dtype(self, k: int) -> FeatureDtype:
        """How k features are stored."""
        return self.dtype or default_dtype(k)

    def draw(self, checkpoint: int, examples: range) -> list[int]:
        """Choose the examples to audit at a checkpoint. Every run chooses the same ones."""
        return draw_audited(examples, self.audit, f"{self.seed}/{checkpoint}")
