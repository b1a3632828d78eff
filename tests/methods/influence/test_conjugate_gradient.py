"""Preconditioned conjugate gradients: the explicit solution, in fewer iterations, and what they say of themselves."""

import logging

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import AttributionMixin
from lightning_trak.methods import ConjugateGradient, Explicit, InfluenceFunction
from lightning_trak.methods.influence import base, ekfac_preconditioner, landmark_preconditioner
from lightning_trak.outputs import ClassificationMargin, ModelOutput, RegressionOutput
from tests.lit import TARGETS, TRAIN, make_data, make_model, make_trainer


class Net(AttributionMixin, L.LightningModule):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.net = nn.Sequential(*layers)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def configure_model_output(self) -> ModelOutput:
        return ClassificationMargin()


class Attention(Net):
    """A transformer layer over three positions, with an embedding of the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.norm = nn.Embedding(3, 4), nn.LayerNorm(4)
        self.inputs, self.qkv, self.head = nn.Linear(2, 4), nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.inputs(inputs.view(-1, 3, 2)) + self.places(torch.arange(3))
        query, key, value = self.qkv(self.norm(hidden)).chunk(3, dim=-1)
        return self.head((hidden + F.scaled_dot_product_attention(query, key, value)).mean(1))


class Tied(Net):
    """A weight with a use that hooks do not see, a layer that is called twice, two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.tied = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.tied.weight = self.first.weight
        self.head = nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.tied(torch.tanh(self.first(inputs))))
        return self.head(self.again(torch.tanh(self.again(hidden)))) + F.linear(inputs, self.head.weight)


NETS = {
    "linear": lambda: Net(nn.Linear(6, 3)),
    "perceptron": lambda: Net(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)),
    "convolution": lambda: Net(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)
    ),
    "attention": Attention,
    "tied": Tied,
}


def seeded(name: str) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NETS[name]()


def method_for(model: nn.Module, solver, **options) -> InfluenceFunction:
    return InfluenceFunction(model, [model.state_dict()], solver=solver, **({"damping": 0.1} | options))


def attribute(method: InfluenceFunction, targets=TARGETS, precision="64-true") -> Tensor:
    return method.attribute(make_trainer(precision=precision), TRAIN, targets)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ekfac", "landmarks"])
@pytest.mark.parametrize("name", NETS)
def test_the_solution_is_the_explicit_one(monkeypatch, name, kind):
    monkeypatch.setattr(landmark_preconditioner, "_COUNT", 20)
    model = seeded(name)
    solver = ConjugateGradient(max_iterations=300, tolerance=1e-10, preconditioner=kind, strict=True)
    expected = attribute(method_for(model, Explicit()))
    torch.testing.assert_close(attribute(method_for(model, solver)), expected, rtol=1e-6, atol=1e-8)


def test_the_exact_hessian_has_the_same_solution_too():
    model = make_model(steps=1000)
    options = {"curvature": "exact", "damping": 5.0}
    solver = ConjugateGradient(max_iterations=300, tolerance=1e-10, preconditioner="ekfac", strict=True)
    data, trainer = make_data(64), make_trainer(precision="64-true")
    expected = method_for(model, Explicit(), **options).attribute(trainer, data, TARGETS)
    scores = method_for(model, solver, **options).attribute(trainer, data, TARGETS)
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-8)


def iterations(model: nn.Module, train: TensorDataset, preconditioner: str | None, damping: float) -> int:
    method = method_for(model, ConjugateGradient(500, 1e-6, preconditioner, strict=True), damping=damping)
    targets = TensorDataset(*(part[:3] for part in train.tensors))
    method.attribute(make_trainer(precision="64-true"), DataLoader(train, batch_size=600), targets)
    (found,) = method.convergence
    assert found.targets == range(3)
    assert found.residuals.max() <= 1e-6 * 10
    return int(found.iterations.max())


def test_landmarks_take_fewer_iterations_than_plain_conjugate_gradients(monkeypatch):
    monkeypatch.setattr(landmark_preconditioner, "_COUNT", 40)
    counts = [iterations(seeded("perceptron"), make_data(60), kind, 0.01) for kind in (None, "landmarks")]
    assert counts[1] < 0.6 * counts[0]


def test_ekfac_takes_fewer_where_there_are_many_more_examples_than_weights():
    inputs, labels = make_data(600).tensors
    train = TensorDataset(inputs * 10 ** torch.linspace(-1, 1, 6), labels)  # badly scaled
    counts = [iterations(seeded("linear"), train, kind, 1e-3) for kind in (None, "ekfac")]
    assert counts[1] < 0.8 * counts[0]


@pytest.mark.parametrize(("kind", "damping"), [("ekfac", 0.1), ("landmarks", 1e-3)])
def test_a_matrix_that_the_preconditioner_has_exactly_takes_one_iteration(kind, damping):
    class Regression(Net):
        def configure_model_output(self) -> ModelOutput:
            return RegressionOutput()

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Regression(nn.Linear(6, 1), nn.Flatten(0))
    train = TensorDataset(TRAIN.tensors[0], TRAIN.tensors[1].float())
    assert iterations(model, train, kind, damping) == 1


def test_convergence_is_logged_and_kept_for_each_checkpoint_and_block(monkeypatch, caplog):
    monkeypatch.setattr(base, "TARGET_BYTES", 5 * 8 * 83)
    states = [seeded("perceptron").state_dict(), make_two()]
    method = InfluenceFunction(
        seeded("perceptron"), states, solver=ConjugateGradient(preconditioner="landmarks"), damping=0.1
    )
    with caplog.at_level(logging.INFO):
        attribute(method)
        attribute(method)
    places = [(found.where[:12], found.targets) for found in method.convergence]
    blocks = [range(0, 5), range(5, 10), range(10, 13)]
    assert places == [(f"checkpoint {number}", block) for number in (0, 1) for block in blocks]
    assert "conjugate gradients at checkpoint 1 (state dict 1), targets 10 to 12: " in caplog.text


def make_two() -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return NETS["perceptron"]().state_dict()


@pytest.mark.parametrize("kind", [None, "ekfac", "landmarks"])
def test_what_has_not_converged_names_the_target_and_says_what_to_do(monkeypatch, kind):
    monkeypatch.setattr(landmark_preconditioner, "_COUNT", 5)
    model, advice = seeded("convolution"), "more max_iterations or a larger damping"
    message = (
        rf"stopped after 1 iterations at a relative residual of \S+ for target \d+ \(.* targets in all\).*{advice}"
    )
    with pytest.warns(RuntimeWarning, match=message) as caught:
        attribute(method_for(model, ConjugateGradient(1, 1e-6, kind)))
    assert ("preconditioner='landmarks'" in str(caught[-1].message)) == (kind is None)
    with pytest.raises(ValueError, match=message):
        attribute(method_for(model, ConjugateGradient(1, 1e-6, kind, strict=True)))


def test_a_tolerance_below_the_rounding_of_the_precision_is_said():
    method = method_for(seeded("perceptron"), ConjugateGradient(100, 1e-9, "landmarks"), damping=1e-3)
    with pytest.warns(RuntimeWarning, match=r"ended where rounding leaves them .* use precision='64-true'"):
        attribute(method, precision="32-true")


def test_a_target_without_gradient_has_no_scores_and_the_others_keep_theirs():
    class Masked(Net):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs) * (inputs[:, :1] != 7)

    model = Masked(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    inputs, labels = (part.clone() for part in TARGETS.tensors)
    inputs[4, 0] = 7
    method = method_for(model, ConjugateGradient(tolerance=1e-8, preconditioner="landmarks", strict=True))
    scores = attribute(method, TensorDataset(inputs, labels))
    expected = attribute(method)
    assert (scores[4] == 0).all()
    assert method.convergence[0].iterations.min() > 0
    others = [number for number in range(len(TARGETS)) if number != 4]
    torch.testing.assert_close(scores[others], expected[others])


def test_layers_that_are_too_wide_or_unseen_are_named(monkeypatch, caplog):
    with caplog.at_level(logging.INFO):
        attribute(method_for(seeded("tied"), ConjugateGradient(tolerance=0.1, preconditioner="ekfac")))
    assert "head.weight: head.weight is also used outside" in caplog.text
    assert "tied (Linear): it is tied" in caplog.text
    monkeypatch.setattr(ekfac_preconditioner, "_LARGEST_SIDE", 8)
    with caplog.at_level(logging.INFO):
        attribute(method_for(seeded("perceptron"), ConjugateGradient(tolerance=0.1, preconditioner="ekfac")))
    assert "EK-FAC covers 0 of 4 parameters" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_iterations": 0}, "`max_iterations` to be a positive integer but got 0"),
        ({"tolerance": 0.0}, "tolerance must be between 0 and 1, got 0.0"),
        ({"tolerance": float("nan")}, "tolerance must be between 0 and 1, got nan"),
        ({"preconditioner": "kfac"}, "preconditioner must be one of 'landmarks', 'ekfac'; got 'kfac'"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        ConjugateGradient(**options)
