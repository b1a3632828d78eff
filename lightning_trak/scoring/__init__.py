"""What turns stored features into scores."""

from lightning_trak.scoring.base import Scorer
from lightning_trak.scoring.combined import combine_runs, combine_scores
from lightning_trak.scoring.gradient import GradientCosineScorer, GradientDotScorer
from lightning_trak.scoring.groups import Groups, aggregate_scores
from lightning_trak.scoring.intervals import Interval
from lightning_trak.scoring.newton.dual import DualScorer, smaller_scorer
from lightning_trak.scoring.newton.primal import PrimalScorer
from lightning_trak.scoring.newton.trak import TRAKScorer
from lightning_trak.scoring.topk import BothEnds, TopK

__all__ = [
    "BothEnds",
    "DualScorer",
    "GradientCosineScorer",
    "GradientDotScorer",
    "Groups",
    "Interval",
    "PrimalScorer",
    "Scorer",
    "TRAKScorer",
    "TopK",
    "aggregate_scores",
    "combine_runs",
    "combine_scores",
    "smaller_scorer",
]
