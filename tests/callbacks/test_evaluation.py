"""Which scores may be measured on the outputs of retrained models."""

import sys

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_trak import GradientDot
from lightning_trak.callbacks import AttributionEvaluation
from lightning_trak.methods import EmpiricalInfluence, RandomScores
from lightning_trak.outputs import RegressionOutput
from lightning_trak.retraining import Retrained, random_subsets
from tests.lit import TARGETS, TRAIN, LitNet, make_trainer


@pytest.mark.parametrize("rows", [[0, 1], [0, 1, 2, 1]])
def test_subsets_without_a_score_are_refused_before_training(rows):
    masks = random_subsets(len(TRAIN), 3)[rows]
    with pytest.raises(ValueError, match=r"at least 3 subsets|Expected different subsets"):
        AttributionEvaluation({}, TRAIN, TARGETS, Retrained(masks, torch.zeros(len(TARGETS), len(rows), 1)))


def test_scores_about_a_loss_that_can_rise_with_the_output_are_refused(tmp_path):
    truth = Retrained(random_subsets(len(TRAIN), 6), torch.randn(len(TARGETS), 6, 1))

    def evaluation(effect_on):
        output = RegressionOutput(lambda module, batch: module(batch[0])[:, 0])
        methods = {"dot": lambda model: GradientDot(model, None, tmp_path, output=output, effect_on=effect_on)}
        return AttributionEvaluation(methods, TRAIN, TARGETS, truth)

    with pytest.raises(ValueError, match=r'can rise with RegressionOutput, .* give the method effect_on="output"'):
        evaluation("loss").evaluate(make_trainer(), LitNet())
    assert not list(tmp_path.iterdir())
    measured = evaluation("output")
    measured.evaluate(make_trainer(), LitNet())
    assert set(measured.lds) == {"dot"}


def test_scores_learned_from_retrained_models_are_not_measured_on_them():
    outputs = torch.randn(len(TARGETS), 20, 1, generator=torch.Generator().manual_seed(0))
    truth = Retrained(random_subsets(len(TRAIN), 20), outputs)

    def measured(learned, held_out):
        methods = {"influence": lambda _: EmpiricalInfluence(truth.masks[learned], truth.outputs[:, learned])}
        retrained = Retrained(truth.masks[held_out], truth.outputs[:, held_out])
        evaluation = AttributionEvaluation(methods, TRAIN, TARGETS, retrained)
        evaluation.evaluate(make_trainer(), LitNet())
        return evaluation.lds["influence"]

    with pytest.raises(ValueError, match=r"2 of 6 were: rows 0, 1 of `masks`"):
        measured(slice(0, 16), slice(14, 20))
    assert measured(slice(0, 14), slice(14, 20)).compute().abs() < 0.5  # the outputs are noise


TRUTH = Retrained(random_subsets(len(TRAIN), 6), torch.zeros(len(TARGETS), 6, 1))


@pytest.mark.parametrize(
    ("retrained", "shown", "missing", "error", "match"),
    [
        (TRUTH, {}, "matplotlib.figure", ModuleNotFoundError, r'pictures need matplotlib: .*\[plots\]"$'),
        (None, {"image": lambda item: item[0]}, "matplotlib.figure", ModuleNotFoundError, "pictures need matplotlib"),
        (None, {"shown": [0, 13]}, None, IndexError, "there is no target 13: they are numbered from 0 to 12"),
    ],
)
def test_what_cannot_be_logged_is_refused_before_training(
    tmp_path, monkeypatch, retrained, shown, missing, error, match
):
    if missing is not None:
        monkeypatch.setitem(sys.modules, missing, None)
    evaluation = AttributionEvaluation({}, TRAIN, TARGETS, retrained, **shown)
    model = LitNet()
    before = model.head.weight.clone()
    trainer = make_trainer(max_epochs=1, logger=CSVLogger(tmp_path), callbacks=[evaluation])
    with pytest.raises(error, match=match):
        trainer.fit(model, DataLoader(TRAIN, batch_size=25))
    assert torch.equal(model.head.weight, before)


def test_tables_need_no_pictures(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    evaluation = AttributionEvaluation({"random": lambda model: RandomScores()}, TRAIN, TARGETS)
    evaluation.evaluate(make_trainer(logger=CSVLogger(tmp_path)), LitNet())
    assert list(tmp_path.rglob("table-step-*.csv"))
