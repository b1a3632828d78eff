"""What turns stored features into scores."""

from lightning_trak.scorers.topk import TopK
from lightning_trak.scorers.trak import TRAKScorer

__all__ = ["TRAKScorer", "TopK"]
