"""Projections: from per-example gradients to features of a chosen size."""

from lightning_trak.projections.base import BoundProjection, Projection, SampleBatch
from lightning_trak.projections.dense import GaussianProjection, RademacherProjection
from lightning_trak.projections.identity import IdentityProjection
from lightning_trak.projections.kronecker import KroneckerProjection
from lightning_trak.projections.principal_projection import PrincipalProjection
from lightning_trak.projections.sparse import SparseProjection

__all__ = [
    "BoundProjection",
    "GaussianProjection",
    "IdentityProjection",
    "KroneckerProjection",
    "PrincipalProjection",
    "Projection",
    "RademacherProjection",
    "SampleBatch",
    "SparseProjection",
]
