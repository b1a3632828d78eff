"""Scores by forward-mode products: those of the gradients, where they are cheaper and the model has them."""

import logging
import re

import pytest
import torch
from lightning_utilities.core import rank_zero
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_trak.methods import Explicit, InfluenceFunction
from lightning_trak.methods.influence import products
from tests.lit import TARGETS, TRAIN, make_model, make_trainer
from tests.methods.influence.test_conjugate_gradient import Net, seeded


def scores_of(model: nn.Module, precision: str = "64-true", **options) -> Tensor:
    method = InfluenceFunction(model, [model.state_dict()], solver=Explicit(), damping=0.1, **options)
    return method.attribute(make_trainer(precision=precision), DataLoader(TRAIN, batch_size=20), TARGETS)


def both(monkeypatch, caplog, model: nn.Module, **options) -> tuple[Tensor, Tensor, str]:
    """Scores by gradients, scores where forward mode is said to be cheap, and the log lines of the latter."""
    monkeypatch.setattr(products, "break_even", lambda passes: 0)
    expected = scores_of(model, **options)
    monkeypatch.setattr(products, "break_even", lambda passes: 100)
    caplog.clear()
    with caplog.at_level(logging.DEBUG, logger=rank_zero.log.name):
        found = scores_of(model, **options)
    return expected, found, caplog.text


@pytest.mark.parametrize("name", ["linear", "perceptron", "convolution", "attention", "tied", "lit"])
def test_forward_mode_products_are_those_of_the_gradients(monkeypatch, caplog, name):
    monkeypatch.setattr(products, "_TOGETHER", 5)
    expected, found, lines = both(monkeypatch, caplog, make_model() if name == "lit" else seeded(name))
    assert "forward-mode products for 13 targets" in lines
    assert "gradients" not in lines
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("options", [{"precision": "32-true"}, {"parameters": "head.*"}])
def test_also_in_float32_and_for_some_parameters(monkeypatch, caplog, options):
    expected, found, lines = both(monkeypatch, caplog, seeded("attention"), **options)
    assert "forward-mode products" in lines
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_no_gradient_of_a_training_example_is_made_but_those_of_the_audit(monkeypatch):
    asked = []
    rows = products.Passes.rows

    def counted(passes, examples, positions=None):
        asked.append((examples is passes.train, positions))
        return rows(passes, examples, positions)

    monkeypatch.setattr(products, "break_even", lambda passes: 100)
    monkeypatch.setattr(products.Passes, "rows", counted)
    scores_of(seeded("perceptron"))
    *_, (train, audited) = asked
    assert train
    assert len(audited) == 2


class Tripled(torch.autograd.Function):
    """Has no forward mode."""

    @staticmethod
    def forward(ctx, inputs):
        return 3 * inputs

    @staticmethod
    def backward(ctx, slope):
        return 3 * slope


class Wrong(Tripled):
    """Has one that is wrong."""

    @staticmethod
    def forward(inputs):
        return 3 * inputs

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx, change):
        return 2 * change


class Late(Wrong):
    """Has one, but not for the examples of the last batch."""

    @staticmethod
    def jvp(ctx, change):
        if change.shape[-2] == 10:
            raise NotImplementedError("no more than twenty")
        return 3 * change


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (Tripled, r"gradients for 13 targets: forward mode fails: \w+: "),
        (Wrong, r"gradients for 13 targets: the forward-mode product of example \d+ is not that of its gradient"),
        (Late, "forward-mode products for 13 targets(.|\n)*gradients for 13 targets: forward mode fails: .*twenty"),
    ],
)
def test_models_without_forward_mode_take_gradients_and_say_why(monkeypatch, caplog, function, reason):
    class Custom(Net):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(function.apply(self.net[0].weight.sum() * inputs))

    torch.manual_seed(0)
    expected, found, lines = both(monkeypatch, caplog, Custom(nn.Linear(6, 3)))
    torch.testing.assert_close(found, expected)
    assert re.search(reason, lines), lines


def test_the_choice_depends_on_cost(caplog):
    wide, deep = Net(nn.Linear(6, 200), nn.Tanh(), nn.Linear(200, 3)), seeded("convolution")
    limits = []

    def limit_of(model):
        method = InfluenceFunction(model, [model.state_dict()], solver=Explicit(), damping=0.1)
        known = products.break_even

        def noted(passes):
            limits.append(known(passes))
            return limits[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(products, "break_even", noted)
            method.attribute(make_trainer(), TRAIN, TARGETS)

    with caplog.at_level(logging.DEBUG, logger=rank_zero.log.name):
        limit_of(wide)
        assert "forward-mode products for 13 targets" in caplog.text
        limit_of(deep)
    assert limits[0] == pytest.approx(1 + products._WRITE / 4, rel=0.15)  # a multiplication and an addition a weight
    assert limits[1] < limits[0]
