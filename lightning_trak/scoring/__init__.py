"""What turns stored features into scores."""

from lightning_trak.scoring.base import Scorer
from lightning_trak.scoring.gradient import GradientCosineScorer, GradientDotScorer
from lightning_trak.scoring.topk import TopK
from lightning_trak.scoring.trak import TRAKScorer

__all__ = ["GradientCosineScorer", "GradientDotScorer", "Scorer", "TRAKScorer", "TopK"]
