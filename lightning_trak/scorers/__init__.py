"""What turns stored features into scores."""

from lightning_trak.scorers.base import Scorer
from lightning_trak.scorers.gradient import GradientCosineScorer, GradientDotScorer
from lightning_trak.scorers.topk import TopK
from lightning_trak.scorers.trak import TRAKScorer

__all__ = ["GradientCosineScorer", "GradientDotScorer", "Scorer", "TRAKScorer", "TopK"]
