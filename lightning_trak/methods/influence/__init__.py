"""Influence functions: explicit, by conjugate gradients, LiSSA or Arnoldi iteration, and by EK-FAC."""

from lightning_trak.methods.influence.arnoldi import Arnoldi
from lightning_trak.methods.influence.conjugate_gradient import ConjugateGradient
from lightning_trak.methods.influence.ekfac import EKFACInfluence
from lightning_trak.methods.influence.function import InfluenceFunction
from lightning_trak.methods.influence.lissa import LiSSA
from lightning_trak.methods.influence.solvers import Explicit, Solver

__all__ = ["Arnoldi", "ConjugateGradient", "EKFACInfluence", "Explicit", "InfluenceFunction", "LiSSA", "Solver"]
