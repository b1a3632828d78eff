"""Attribution methods beside TRAK, all with the interface of `Method`."""

from lightning_trak.methods.base import Method
from lightning_trak.methods.influence import (
    Arnoldi,
    ConjugateGradient,
    EKFACInfluence,
    Explicit,
    InfluenceFunction,
    LiSSA,
)

__all__ = [
    "Arnoldi",
    "ConjugateGradient",
    "EKFACInfluence",
    "Explicit",
    "InfluenceFunction",
    "LiSSA",
    "Method",
]
