"""Metagradients against a closed form, and against finite differences of whole trainings."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset, WeightedRandomSampler

from lightning_trak import Metagradient
from lightning_trak.replay import OptimizerStep
from lightning_trak.replay.group_norm import PlainGroupNorm
from lightning_trak.replay.optimizers.sgd import SGDStep
from lightning_trak.replay.player import ReplayError
from lightning_trak.replay.reverse.products import Products
from tests.methods.metagradients import (
    DATA,
    DIRECTION,
    NETS,
    OPTIMIZERS,
    TARGETS,
    Linear,
    attribute,
    layers,
    require_derivative,
    sgd,
)
from tests.replay.runs import Net, ThawAndFreeze, make_data, sgd_of_trained, shuffled, train

# --- closed form --------------------------------------------------------------------------------------------------


def test_linear_regression_by_gradient_descent(tmp_path: Path) -> None:
    """With residuals r_t and A = X^T X / n: d theta_T / d w_i = -(lr / n) sum_t (I - lr A)^(T-1-t) x_i r_t,i."""
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(8, 3, generator=generator), torch.randn(8, generator=generator)
    targets = torch.randn(4, 3, generator=generator)
    steps, module = 7, Linear()
    data = TensorDataset(inputs, labels)
    trainer = train(module, data, tmp_path, loader=lambda data: DataLoader(data, batch_size=8), max_epochs=steps)
    method = Metagradient(module, tmp_path, progress_bar=False)
    scores = method.attribute(trainer, data, TensorDataset(targets, torch.zeros(4)))

    x, y, moved = inputs.double(), labels.double(), torch.zeros(3, 8, dtype=torch.float64)
    theta = torch.zeros(3, dtype=torch.float64)
    shrink = torch.eye(3, dtype=torch.float64) - 0.3 * x.T @ x / 8
    for _ in range(steps):
        residuals = x @ theta - y
        moved = shrink @ moved - 0.3 / 8 * x.T * residuals
        theta = theta - 0.3 / 8 * x.T @ residuals
    torch.testing.assert_close(scores, targets.double() @ moved, rtol=1e-12, atol=1e-14)


# --- finite differences -------------------------------------------------------------------------------------------


TRAINERS: dict[str, dict[str, Any]] = {
    "clip by norm": {"gradient_clip_val": 0.4},
    "clip by value": {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
    "accumulation": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.4},
    "float inputs": {"loader": lambda data: shuffled(data, 5, drop_last=True)},
    "repetitions": {"loader": lambda data: DataLoader(data, 5, sampler=WeightedRandomSampler(torch.ones(12), 15))},
}


@pytest.mark.parametrize("name", NETS)
def test_layers(name: str, tmp_path: Path) -> None:
    def make() -> Net:
        return Net(NETS[name], sgd(lr=0.2, momentum=0.5))

    module = make()
    trainer = train(module, DATA, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*batch normalization.*")
        scores = attribute(module, tmp_path, trainer)
        one_by_one = attribute(module, tmp_path, trainer, block_size=1)
    torch.testing.assert_close(scores, one_by_one, rtol=1e-9, atol=1e-12)
    require_derivative(make, scores, {})


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str, tmp_path: Path) -> None:
    def make() -> Net:
        return Net(optimizer=OPTIMIZERS[name])

    module = make()
    trainer = train(module, DATA, tmp_path)
    require_derivative(make, attribute(module, tmp_path, trainer), {})


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers(name: str, tmp_path: Path) -> None:
    module = Net(optimizer=sgd(momentum=0.9))
    trainer = train(module, DATA, tmp_path, **TRAINERS[name])
    require_derivative(lambda: Net(optimizer=sgd(momentum=0.9)), attribute(module, tmp_path, trainer), TRAINERS[name])


@pytest.mark.parametrize("net", ["batch norm", "dropout"])
def test_accumulation_with_statistics_and_random_numbers(net: str, tmp_path: Path) -> None:
    def make() -> Net:
        return Net(NETS[net], sgd(lr=0.2))

    module, options = make(), {"accumulate_grad_batches": 3}
    trainer = train(module, DATA, tmp_path, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*batch normalization.*")
        scores = attribute(module, tmp_path, trainer)
    require_derivative(make, scores, options)


def newton_schulz(matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """torch's iterations without bfloat16."""
    found = matrix.T if matrix.size(0) > matrix.size(1) else matrix
    found = found / found.norm().clamp(min=eps)
    a, b, c = coefficients
    for _ in range(steps):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.T if matrix.size(0) > matrix.size(1) else found


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("options", [{}, {"nesterov": False, "adjust_lr_fn": "match_rms_adamw"}])
def test_muon_without_rounding(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", newton_schulz)

    def make() -> Net:
        body = lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False))  # noqa: E731
        return Net(body, lambda module: torch.optim.Muon(module.parameters(), lr=0.02, **options))

    module = make()
    trainer = train(module, DATA, tmp_path)
    with pytest.warns(UserWarning, match="scores are those of the same steps without rounding"):
        scores = attribute(module, tmp_path, trainer)
    require_derivative(make, scores, {})


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_with_rounding_that_iterations_amplify(tmp_path: Path) -> None:
    body = lambda: nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False))  # noqa: E731
    module = Net(body, lambda module: torch.optim.Muon(module.parameters(), lr=0.01))
    trainer = train(module, DATA, tmp_path)
    with pytest.warns(UserWarning, match="scores are those of the same steps without rounding"):
        assert attribute(module, tmp_path, trainer).isfinite().all()


class Slowed(torch.optim.SGD):
    """SGD with half of the gradient."""

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure else None
        for parameter in self.param_groups[0]["params"]:
            parameter.grad.div_(2)
        super().step()
        return loss


@pytest.mark.parametrize("factor", [0.5, 0.55])
def test_an_optimizer_of_the_user(factor: float, tmp_path: Path) -> None:
    def make() -> Net:
        return Net(optimizer=lambda module: Slowed(module.parameters(), lr=0.4, momentum=0.9))

    class SlowedStep(SGDStep, optimizer=Slowed):
        def update(self, parameter: Any, gradient: Any, kept: Any, group: Any) -> Any:
            return super().update(parameter, factor * gradient, kept, group)

    module = make()
    try:
        trainer = train(module, DATA, tmp_path)
        if factor == 0.5:
            require_derivative(make, attribute(module, tmp_path, trainer), {})
        else:
            with pytest.raises(ValueError, match=r"step 5 moved the weights by .* gives a step that differs"):
                attribute(module, tmp_path, trainer)
    finally:
        OptimizerStep.known.pop(Slowed)
    with pytest.raises(ValueError, match=r"Slowed, whose step is not known here; known are .*torch\.optim\.adam\.Adam"):
        attribute(module, tmp_path, trainer)


def test_layers_that_thaw(tmp_path: Path) -> None:
    def make() -> Net:
        body = lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))  # noqa: E731
        return Net(body, sgd_of_trained)

    module = make()
    trainer = train(module, DATA, tmp_path, callbacks=[ThawAndFreeze()], max_epochs=3)
    require_derivative(make, attribute(module, tmp_path, trainer), {"callbacks": [ThawAndFreeze()], "max_epochs": 3})


def test_a_frozen_part_in_half_precision(tmp_path: Path) -> None:
    class Based(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.head = nn.Linear(4, 5).bfloat16().requires_grad_(False), nn.Linear(5, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head(self.base(inputs.bfloat16()).float().tanh())

    def make() -> Net:
        return Net(Based, sgd(lr=0.2))

    module = make()
    trainer = train(module, DATA, tmp_path, precision="32-true")
    scores = attribute(module, tmp_path, trainer)
    assert scores.dtype == torch.float32
    changed = []
    for factor in (1.0, 1.1):
        other = make()
        other.weights = 1 + (factor - 1) * DIRECTION.float()
        train(other, DATA, precision="32-true")
        with torch.no_grad():
            changed.append(other.configure_model_output().output(other.eval(), TARGETS.tensors).double())
    expected = (changed[1] - changed[0]) / 0.1
    assert (scores.double() @ DIRECTION - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("name", ["momentum", "amsgrad", "smooth adamw", "groups", "schedule"])
def test_many_targets_are_as_each_alone(name: str, tmp_path: Path) -> None:
    """For many targets, an elementwise update is a product with numbers. For one, autograd goes through it."""
    # With clipping, the maximum of AMSGrad has a kink in reach of the finite differences.
    options: dict[str, Any] = {} if name == "amsgrad" else {"gradient_clip_val": 0.4}
    module, targets = Net(optimizer=OPTIMIZERS[name]), make_data(9, seed=5)
    trainer = train(module, DATA, tmp_path, **options)
    scores = attribute(module, tmp_path, trainer, targets)
    alone = [attribute(module, tmp_path, trainer, Subset(targets, [number])) for number in (0, 4, 8)]
    torch.testing.assert_close(scores[[0, 4, 8]], torch.cat(alone), rtol=1e-9, atol=1e-13)
    for cut in ({"block_size": 5}, {"block_size": 5, "micro_batch_size": 2}):  # blocks of 5 and 4 targets
        torch.testing.assert_close(attribute(module, tmp_path, trainer, targets, **cut), scores, rtol=1e-9, atol=1e-13)
    require_derivative(lambda: Net(optimizer=OPTIMIZERS[name]), scores, options, targets)


class Normalized(torch.optim.SGD):
    """SGD along the direction of each gradient, so that the numbers of a tensor depend on each other."""

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure else None
        for parameter in self.param_groups[0]["params"]:
            parameter.grad.div_(parameter.grad.norm())
        super().step()
        return loss


class Functional(nn.Module):
    """A layer that calls ``F.group_norm`` without a module for it."""

    def forward(self, inputs: Tensor) -> Tensor:
        return F.group_norm(inputs, 2)


@pytest.mark.parametrize("net", ["group norm", "functional", "attention"])
def test_which_layers_take_many_targets_at_once(net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    class Watched(Products):
        def _audit(self, *args: Any) -> None:
            super()._audit(*args)
            found.append(self.batched)

    monkeypatch.setattr("lightning_trak.replay.reverse.step.Products", Watched)
    module = Net(NETS.get(net, lambda: layers(Functional())))
    trainer = train(module, DATA, tmp_path)
    scores = attribute(module, tmp_path, trainer)
    torch.testing.assert_close(scores, attribute(module, tmp_path, trainer, block_size=1), rtol=1e-9, atol=1e-12)
    assert found[0] or net == "functional"  # of which some versions of torch have a wrong second derivative


def test_operations_without_a_second_derivative_are_named(tmp_path: Path) -> None:
    class Bag(nn.EmbeddingBag):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward((inputs > 0).long())

    module = Net(lambda: Bag(2, 3))
    trainer = train(module, DATA, tmp_path)
    with pytest.raises(ValueError, match=r"PyTorch cannot: the derivative for '_embedding_bag_backward' is not"):
        attribute(module, tmp_path, trainer)


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (3, 4, 2, 3)])
def test_group_norm_is_torchs(shape: tuple[int, ...]) -> None:
    inputs, weight, bias = torch.randn(shape).double(), torch.randn(4).double(), torch.randn(4).double()
    for options in ({}, {"weight": weight}, {"weight": weight, "bias": bias, "eps": 0.1}):
        expected = F.group_norm(inputs, 2, **options)
        with PlainGroupNorm():
            found = F.group_norm(inputs, 2, **options)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_an_override_is_not_taken_for_elementwise(tmp_path: Path) -> None:
    class NormalizedStep(SGDStep, optimizer=Normalized):
        def update(self, parameter: Any, gradient: Any, kept: Any, group: Any) -> Any:
            return super().update(parameter, gradient / gradient.norm(), kept, group)

    def make() -> Net:
        return Net(optimizer=lambda module: Normalized(module.parameters(), lr=0.1, momentum=0.9))

    try:
        assert SGDStep.elementwise
        assert SGDStep.linear
        assert not NormalizedStep.elementwise
        assert not NormalizedStep.linear
        module, targets = make(), make_data(9, seed=5)
        trainer = train(module, DATA, tmp_path)
        require_derivative(make, attribute(module, tmp_path, trainer, targets), {}, targets)
        NormalizedStep.linear = True
        with pytest.raises(ReplayError, match="the gradient of the examples' losses gives a step that differs"):
            attribute(module, tmp_path, trainer, targets)
    finally:
        OptimizerStep.known.pop(Normalized)
