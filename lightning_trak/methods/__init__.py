"""Attribution methods, all with the interface of `Method`."""

from lightning_trak.methods.base import LabelStatistic, MatrixMethod, Method
from lightning_trak.methods.baselines.bm25 import BM25
from lightning_trak.methods.baselines.data_shapley import DataShapley
from lightning_trak.methods.baselines.datamodels import Datamodels
from lightning_trak.methods.baselines.empirical_influence import EmpiricalInfluence
from lightning_trak.methods.baselines.knn_shapley import KNNShapley
from lightning_trak.methods.baselines.random_scores import RandomScores
from lightning_trak.methods.baselines.similarity import RepresentationSimilarity
from lightning_trak.methods.baselines.training_loss import TrainingLoss
from lightning_trak.methods.features.base import FeatureMethod
from lightning_trak.methods.features.exact_kernel import ExactKernel
from lightning_trak.methods.features.gradients import GradientCosine, GradientDot, TracIn
from lightning_trak.methods.features.trak import TRAK
from lightning_trak.methods.influence import (
    Arnoldi,
    ConjugateGradient,
    EKFACInfluence,
    Explicit,
    InfluenceFunction,
    LiSSA,
)
from lightning_trak.methods.metagradient import Metagradient

__all__ = [
    "BM25",
    "TRAK",
    "Arnoldi",
    "ConjugateGradient",
    "DataShapley",
    "Datamodels",
    "EKFACInfluence",
    "EmpiricalInfluence",
    "ExactKernel",
    "Explicit",
    "FeatureMethod",
    "GradientCosine",
    "GradientDot",
    "InfluenceFunction",
    "KNNShapley",
    "LabelStatistic",
    "LiSSA",
    "MatrixMethod",
    "Metagradient",
    "Method",
    "RandomScores",
    "RepresentationSimilarity",
    "TracIn",
    "TrainingLoss",
]
