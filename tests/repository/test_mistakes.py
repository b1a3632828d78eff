"""Mistakes in arguments end in an error that names the argument, not in one of Python or torch."""

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_trak import TRAK
from lightning_trak.cleaning import Ranking, duplicates
from lightning_trak.methods import (
    BM25,
    Arnoldi,
    ConjugateGradient,
    Datamodels,
    DataShapley,
    EKFACInfluence,
    InfluenceFunction,
    KNNShapley,
    LiSSA,
    Metagradient,
    RandomScores,
)
from lightning_trak.metrics.functional import bootstrap_interval, flip_labels
from lightning_trak.reporting.loggers import log_attributions
from lightning_trak.reporting.plots import plot_attributions
from lightning_trak.retraining import RetrainingFleet, TailPatch, random_removals, random_subsets
from tests.lit import TARGETS, TRAIN, LitNet, make_model, make_trainer

MASKS = random_subsets(50, 4)
SCORES = torch.randn(13, 50, generator=torch.Generator().manual_seed(0))
IMAGES = torch.zeros(2, 4, 4)
TEXTS = [("words", "more")]


def fleet(**options):
    return RetrainingFleet("nowhere", LitNet, make_trainer, TRAIN, TARGETS, MASKS, **options)


def ranking():
    return Ranking("wrong labels", "suspicion", torch.arange(50), torch.zeros(50), TRAIN)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Arnoldi(num_iterations=-1), ValueError, "`num_iterations` to be a positive integer but got -1"),
        (lambda: Arnoldi(rank=2.5), ValueError, "`rank` to be a positive integer but got 2.5"),
        (lambda: LiSSA(tolerance=-1), ValueError, "tolerance must be at least 0"),
        (lambda: ConjugateGradient(tolerance="low"), TypeError, "tolerance must be a number, got 'low'"),
        (lambda: InfluenceFunction(make_model(), seed="a"), TypeError, "seed must be an integer, got 'a'"),
        (lambda: TRAK(make_model(), store=5), TypeError, "expected the path of a store, got a int"),
        (lambda: TRAK(make_model(), store="x", soft_threshold="a"), TypeError, "soft_threshold must be a number"),
        (lambda: TRAK(make_model(), store="x").featurize(prt="1/2"), TypeError, "featurize got .*did you mean 'part'"),
        (lambda: TRAK(make_model(), store="x").scorer(0), ValueError, "top_k must be at least 1, got 0"),
        (lambda: Metagradient(make_model(), 5), TypeError, "expected the directory of a recording, or several, got a"),
        (lambda: KNNShapley(make_model(), pool="mean"), TypeError, "pool must be a function, got 'mean'"),
        (lambda: Datamodels(MASKS.numpy(), SCORES), TypeError, "`masks` as a torch.Tensor, but got a ndarray"),
        (lambda: Datamodels(MASKS, SCORES[:, :4].numpy()), TypeError, "`outputs` as a torch.Tensor"),
        (lambda: Datamodels(MASKS, SCORES[:, :4], folds=2.5), ValueError, "`folds` to be a positive integer"),
        (lambda: RandomScores("a"), TypeError, "seed must be an integer, got 'a'"),
        (lambda: RandomScores(torch.tensor(0.5)), TypeError, r"seed must be an integer, got tensor\(0.5"),
        (lambda: DataShapley(LitNet, make_trainer, permutations=2.5), ValueError, "`permutations` to be a positive"),
        (lambda: BM25("text").attribute(make_trainer(), TEXTS, TEXTS), TypeError, "text='text' names nothing in an it"),
        (lambda: BM25("text").attribute(None, [{"t": "a"}], [{"t": "b"}]), TypeError, "a dict with 't': give a key"),
        (lambda: duplicates(RandomScores(), None, TRAIN, "high"), TypeError, "threshold must be a number"),
        (lambda: random_subsets(50, 4, fraction="half"), TypeError, "fraction must be a number, got 'half'"),
        (lambda: random_removals(50, 4, None), TypeError, "fraction must be a number, got None"),
        (lambda: random_subsets(50, 4, seed="a"), TypeError, "seed must be an integer"),
        (lambda: bootstrap_interval(SCORES, "high"), TypeError, "confidence must be a number"),
        (lambda: fleet(seed=torch.tensor(0.5)), ValueError, "seed must be a whole number from 0 to"),
        (lambda: fleet(make_loader=5), TypeError, "make_loader must be a function"),
        (lambda: fleet().run(retries=-1), ValueError, "retries must be at least 0, got -1"),
        (lambda: TailPatch(("TRAK",), SCORES[:1]).lead("EK-FAC"), ValueError, "method must be one of 'TRAK'; got 'EK-"),
        (lambda: ranking().curve("wrong.csv"), TypeError, "expected wrong as bools or as positions, got 'wrong.csv'"),
        (lambda: plot_attributions(IMAGES, IMAGES, SCORES[:2, :2], k=0), ValueError, "`k` to be a positive integer"),
        (lambda: plot_attributions(IMAGES, IMAGES, SCORES[:2, :2].numpy()), TypeError, "`scores` as a torch.Tensor"),
        (
            lambda: plot_attributions(IMAGES, IMAGES, SCORES[:2, :2], train_names=["one"]),
            ValueError,
            "expected train_names of 2 images, got 1",
        ),
        (lambda: log_attributions(CSVLogger("x"), SCORES, TRAIN, TARGETS), TypeError, "a list of loggers.*CSVLogger"),
        (lambda: log_attributions(["csv"], SCORES, TRAIN, TARGETS), TypeError, "loggers of Lightning.*got a str"),
        (lambda: log_attributions([], SCORES.numpy(), TRAIN, TARGETS), TypeError, "returns them, got a ndarray"),
        (lambda: log_attributions([], SCORES, TRAIN, TARGETS, k=-1), ValueError, "`k` to be a positive integer"),
    ],
)
def test_the_error_names_the_argument(make, error, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"k": 2.5}, ValueError, "`k` to be a positive integer but got 2.5"),
        ({"shown": [1.5]}, TypeError, "targets are named by their positions, which are integers, got 1.5"),
        ({"shown": "all"}, TypeError, "which are integers, got 'a'"),
        ({"output": 5}, TypeError, "output must be a ModelOutput, got int"),
    ],
)
def test_show(options, error, match):
    with pytest.raises(error, match=match):
        EKFACInfluence(make_model()).show(SCORES, TRAIN, TARGETS, **options)


def test_positions_of_predictions():
    for position in (13, -1):
        with pytest.raises(IndexError, match="there is no target"):
            EKFACInfluence(make_model()).describe_predictions(make_trainer(), TARGETS, [position])


def test_integers_of_numpy_are_integers():
    assert torch.equal(random_subsets(np.int64(50), np.int64(4), seed=np.int64(3)), random_subsets(50, 4, seed=3))
    assert torch.equal(bootstrap_interval(SCORES, seed=np.int64(1)), bootstrap_interval(SCORES, seed=1))
    labels = torch.arange(20) % 3
    assert torch.equal(flip_labels(labels, seed=np.int64(1))[0], flip_labels(labels, seed=1)[0])


def test_labels_that_are_real_numbers_are_no_classes():
    numbers = torch.utils.data.TensorDataset(TRAIN.tensors[0], torch.linspace(0, 1, 50))
    method = KNNShapley(make_model(), forward=lambda module, batch: module(batch[0]))
    with pytest.raises(ValueError, match="labels are real numbers, which are equal by chance alone"):
        method.attribute(make_trainer(), numbers, numbers)
