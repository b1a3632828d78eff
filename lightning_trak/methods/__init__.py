"""Attribution methods, all with the interface of `Method`."""

from lightning_trak.methods.base import Method
from lightning_trak.methods.feature import FeatureMethod
from lightning_trak.methods.gradients import GradientCosine, GradientDot, TracIn
from lightning_trak.methods.influence import (
    Arnoldi,
    ConjugateGradient,
    EKFACInfluence,
    Explicit,
    InfluenceFunction,
    LiSSA,
)
from lightning_trak.methods.trak import TRAK

__all__ = [
    "TRAK",
    "Arnoldi",
    "ConjugateGradient",
    "EKFACInfluence",
    "Explicit",
    "FeatureMethod",
    "GradientCosine",
    "GradientDot",
    "InfluenceFunction",
    "LiSSA",
    "Method",
    "TracIn",
]
