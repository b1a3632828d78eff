"""How objects show themselves: short, true, and never with an error."""

import re
from pathlib import Path

import pytest
import torch

from lightning_trak import TRAK, GradientDot, LinearDatamodelingScore, TracIn, TrainingRecorder, TRAKCallback
from lightning_trak.callbacks import AttributionEvaluation, SmoothTwin
from lightning_trak.methods import (
    BM25,
    Datamodels,
    DataShapley,
    EKFACInfluence,
    ExactKernel,
    InfluenceFunction,
    KNNShapley,
    Metagradient,
    RandomScores,
    RepresentationSimilarity,
    TrainingLoss,
)
from lightning_trak.metrics.functional import mislabel_detection_curve
from lightning_trak.projections import SparseProjection
from lightning_trak.retraining import RecordedFleet, RetrainingFleet, random_subsets
from lightning_trak.scoring import BothEnds, Interval, TopK
from lightning_trak.texts.display import Displayed
from tests.lit import TARGETS, TRAIN, LitNet, make_checkpoints, make_model, make_trainer

SCORES = torch.arange(3 * 7.0).view(3, 7)
TOP, LOW = (TopK(*SCORES.topk(6, largest=largest)) for largest in (True, False))
MASKS = random_subsets(len(TRAIN), 5)


def objects():
    model = make_model()
    return [
        TRAK(model, make_checkpoints(3), "run/features", projection=SparseProjection(32)),
        TracIn(model, store="run/features", learning_rates=0.1),
        GradientDot(model, store="run/features"),
        ExactKernel(model, store="run/kernel"),
        InfluenceFunction(model),
        EKFACInfluence(model),
        RepresentationSimilarity(model),
        KNNShapley(model, k=3),
        RandomScores(),
        TrainingLoss(model),
        BM25("text"),
        Datamodels(MASKS, torch.zeros(3, 5)),
        DataShapley(LitNet, make_trainer),
        TRAKCallback("run/snapshots", every_n_epochs=5),
        TrainingRecorder("run/recording"),
        SmoothTwin(),
        AttributionEvaluation({"TRAK": TRAK, "TracIn": TracIn}, TRAIN, TARGETS),
        LinearDatamodelingScore(MASKS),
        RetrainingFleet("run/fleet", LitNet, lambda: make_trainer(max_epochs=1), TRAIN, TARGETS, MASKS),
        TOP,
        BothEnds(TOP, LOW),
        Interval(SCORES, SCORES, SCORES),
        Interval(TOP, TOP, TOP),
        mislabel_detection_curve(torch.rand(1000), torch.arange(1000) < 9),
    ]


def test_short_and_true(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for item in objects():
        text = repr(item)
        assert text.startswith(type(item).__name__ + "(")
        assert len(text) < 300
        assert "\n" not in text
        assert "object at 0x" not in text
    assert not list(tmp_path.iterdir())


def test_what_is_said():
    trak, *_ = objects()
    assert repr(trak).startswith(
        "TRAK(model=LitNet, checkpoints=3, store='run/features', output=ClassificationMargin, projection="
    )
    assert repr(trak).endswith(
        "dtype=float32, curvature='gauss_newton', damping='auto', loss_gradients='per_checkpoint', lag='auto')"
    )
    assert "checkpoints=the model's current weights" in repr(TRAK(make_model(), store="s"))
    assert repr(TRAKCallback(Path("run"))) == "TRAKCallback(dirpath='run', every_n_epochs=1, save_last=True)"
    assert repr(KNNShapley(make_model(), {"w": torch.ones(1)}, layer="head", k=3)) == (
        "KNNShapley(model=LitNet, checkpoints=state dict 0, layer='head', similarity='l2', k=3)"
    )
    assert "damping</th><td" in trak._repr_html_().replace(' style="text-align: left"', "")


def test_the_best_examples():
    assert repr(TOP) == "TopK(3 targets; #6 +6, #5 +5, #4 +4, ...)"
    assert repr(BothEnds(TOP, LOW)) == (
        "BothEnds(3 targets; proponents #6 +6, #5 +5, #4 +4; opponents #0 +0, #1 +1, #2 +2, ...)"
    )
    rows = re.findall("<tr>(.*?)</tr>", BothEnds(TOP, LOW)._repr_html_())
    assert re.findall(r'colspan="(\d)">(\w+)', rows[0]) == [("5", "proponents"), ("5", "opponents")]
    for target, row in enumerate(rows[1:]):
        found = re.findall(r"#(\d+) \+(\d+)<", row)
        expected = [7 * target + i for i in (6, 5, 4, 3, 2, 0, 1, 2, 3, 4)]
        assert [(int(index), int(value)) for index, value in found] == [(value % 7, value) for value in expected]
    page = TopK(torch.zeros(50, 8), torch.zeros(50, 8).long())._repr_html_()
    assert "TopK: 50 targets, the first 10 of them, the first 5 of 8 examples each" in page
    assert page.count("<tr>") == 10


@pytest.mark.parametrize(
    "top",
    [
        TopK(None, None),
        TopK(torch.zeros(0, 4), torch.zeros(0, 4).long()),
        TopK(torch.zeros(2, 0), torch.zeros(2, 0).long()),
        TopK(torch.tensor(3.0), torch.tensor(1)),
        TopK(torch.full((2, 2), torch.nan), torch.ones(2, 3).long()),
        BothEnds(TOP, None),
        BothEnds(TOP, TopK(*(part[:1] for part in TOP))),
    ],
)
def test_wrong_numbers_raise_nothing(top):
    assert repr(top)
    assert top._repr_html_().startswith(("<table>", "<pre>"))


def test_what_is_only_half_made_raises_nothing():
    for item in objects():
        if isinstance(item, Displayed):
            half = type(item).__new__(type(item))
            assert repr(half) == f"{type(item).__name__}()"
            assert half._repr_html_().startswith("<table>")
    for kind in (RecordedFleet, Metagradient):
        assert repr(kind.__new__(kind)) == f"{kind.__name__}()"


class Bad(Displayed):
    _shown = ("text", "broken", "hostile", "long", "missing")
    text = "<b>\x1b[31m&</b>"
    long = "a" * 500

    @property
    def broken(self):
        raise OSError("no such file")

    @property
    def hostile(self):
        class Hostile:
            def __getattr__(self, name):
                raise RuntimeError(name)

        return Hostile()


def test_values_of_all_kinds_are_harmless():
    text, page = repr(Bad()), Bad()._repr_html_()
    assert "no such file" not in text
    assert "\x1b" not in text + page
    assert "<b>" not in page
    assert len(text) < 200
