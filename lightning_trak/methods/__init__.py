"""Attribution methods beside TRAK, all with the interface of `Method`."""

from lightning_trak.methods.base import Method
from lightning_trak.methods.bm25 import BM25
from lightning_trak.methods.data_shapley import DataShapley
from lightning_trak.methods.datamodels import Datamodels
from lightning_trak.methods.empirical_influence import EmpiricalInfluence
from lightning_trak.methods.knn_shapley import KNNShapley
from lightning_trak.methods.random_scores import RandomScores
from lightning_trak.methods.similarity import RepresentationSimilarity

__all__ = [
    "BM25",
    "DataShapley",
    "Datamodels",
    "EmpiricalInfluence",
    "KNNShapley",
    "Method",
    "RandomScores",
    "RepresentationSimilarity",
]
