"""Metagradients for an average order, against finite differences of trainings and against recorded orders."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset, WeightedRandomSampler

from lightning_trak import Metagradient
from lightning_trak.replay.reverse import average_order
from tests.methods.metagradients import DATA, DIRECTION, NETS, STEP, TARGETS, attribute, layers, outputs, sgd
from tests.replay.runs import Net, ThawAndFreeze, make_data, sgd_of_trained, shuffled, train

SHARES = torch.full_like(DIRECTION, 1 / len(DIRECTION))


class Spread(Net):
    """From some step on, each step also minimizes the losses of all examples, with given weights."""

    extra = torch.zeros_like(DIRECTION)
    first = 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self._trainer is None or self.global_step < self.first:  # a repeated step has no Trainer
            return loss
        inputs, labels = DATA.tensors[0].double(), DATA.tensors[1]
        return loss + (self.extra * F.cross_entropy(self(inputs), labels, reduction="none")).sum()


def require_derivative(
    make: Callable[[], Spread], scores: Tensor, options: dict[str, Any], first: int = 0, shares: Tensor = SHARES
) -> None:
    def at(distance: float) -> Tensor:
        module = make()
        module.extra, module.first = distance * STEP * DIRECTION * shares, first
        train(module, DATA, **options)
        return outputs(module)

    expected = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * STEP)
    assert expected.norm() > 1e-3
    assert (scores @ DIRECTION - expected).norm() < 1e-7 * expected.norm()


@pytest.fixture
def _each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """All examples are differentiated at each step."""
    monkeypatch.setattr(average_order, "WINDOWS", 1000)


def adamw(module: Net) -> Any:
    return torch.optim.AdamW(module.parameters(), lr=0.01)


@pytest.mark.usefixtures("_each_step")
@pytest.mark.parametrize(
    ("optimizer", "options", "last_steps"),
    [
        (sgd(lr=0.2, momentum=0.9, weight_decay=0.01), {}, None),
        (sgd(lr=0.2, momentum=0.9), {"loader": lambda data: shuffled(data, 5)}, 4),
        (sgd(lr=0.2), {"accumulate_grad_batches": 2, "gradient_clip_val": 0.4}, None),
        (adamw, {}, 3),
    ],
)
def test_is_the_derivative_by_weights_in_each_step(
    optimizer: Any, options: dict[str, Any], last_steps: int | None, tmp_path: Path
) -> None:
    def make() -> Spread:
        return Spread(lambda: layers(), optimizer)

    module = make()
    trainer = train(module, DATA, tmp_path, **options)
    scores = attribute(module, tmp_path, trainer, order="average", last_steps=last_steps)
    require_derivative(make, scores, options, 0 if last_steps is None else trainer.global_step - last_steps)


@pytest.mark.usefixtures("_each_step")
def test_layers_that_thaw_and_freeze(tmp_path: Path) -> None:
    def make() -> Spread:
        return Spread(optimizer=sgd_of_trained)

    module = make()
    trainer = train(module, DATA, tmp_path, callbacks=[ThawAndFreeze()], max_epochs=3)
    scores = attribute(module, tmp_path, trainer, order="average")
    require_derivative(make, scores, {"callbacks": [ThawAndFreeze()], "max_epochs": 3})


@pytest.mark.usefixtures("_each_step")
@pytest.mark.filterwarnings("ignore:.*returned `None`")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_batches_that_training_skips(accumulate: int, tmp_path: Path) -> None:
    class Skipping(Spread):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    def make() -> Skipping:
        return Skipping(optimizer=sgd(momentum=0.9))

    module, options = make(), {"accumulate_grad_batches": accumulate}
    trainer = train(module, DATA, tmp_path, **options)
    require_derivative(make, attribute(module, tmp_path, trainer, order="average"), options)


@pytest.mark.usefixtures("_each_step")
def test_examples_count_as_often_as_the_run_used_them(tmp_path: Path) -> None:
    def loader(data: Any) -> DataLoader[Any]:
        weights = torch.arange(len(data)) * 1.0
        return DataLoader(data, 4, sampler=WeightedRandomSampler(weights, 20, generator=torch.Generator()))

    module = Spread(optimizer=sgd(lr=0.2))
    trainer = train(module, DATA, tmp_path, loader=loader)
    generator, uses = torch.Generator(), torch.zeros_like(DIRECTION)
    sampler = WeightedRandomSampler(torch.arange(len(DATA)) * 1.0, 20, generator=generator)
    for _ in range(2):
        for position in sampler:
            uses[position] += 1
    assert (uses == 0).any()
    scores = attribute(module, tmp_path, trainer, order="average")
    assert torch.equal((scores == 0).all(0), uses == 0)
    require_derivative(lambda: Spread(optimizer=sgd(lr=0.2)), scores, {"loader": loader}, shares=uses / uses.sum())


def test_windows_change_little_in_a_smooth_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Net(optimizer=sgd(lr=0.02, momentum=0.9))
    trainer = train(module, DATA, tmp_path, max_epochs=8)
    windows = attribute(module, tmp_path, trainer, order="average")
    monkeypatch.setattr(average_order, "WINDOWS", 1000)
    steps = attribute(module, tmp_path, trainer, order="average")
    assert 0 < (windows - steps).norm() < 0.03 * steps.norm()


@pytest.mark.slow
def test_the_mean_over_orders_comes_near(tmp_path: Path) -> None:
    recorded, averages = [], []
    for seed in range(6):
        module = Net(optimizer=sgd(lr=0.05, momentum=0.9))
        loader = lambda data, seed=seed: shuffled(data, 2, generator=torch.Generator().manual_seed(seed))  # noqa: E731
        trainer = train(module, DATA, tmp_path / str(seed), loader=loader)
        recorded.append(attribute(module, tmp_path / str(seed), trainer))
        averages.append(attribute(module, tmp_path / str(seed), trainer, order="average"))
    average = torch.stack(averages).mean(0)

    def distance(scores: Tensor) -> float:
        return float((scores - average).norm() / average.norm())

    alone, spread = (sum(map(distance, found)) / len(found) for found in (recorded, averages))
    assert distance(torch.stack(recorded).mean(0)) < 0.6 * alone
    assert spread < 0.6 * alone


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Net, Path, L.Trainer, Tensor]:
    directory = tmp_path_factory.mktemp("recorded")
    module = Net(optimizer=sgd(momentum=0.9))
    trainer = train(module, DATA, directory, max_epochs=3)
    return module, directory, trainer, attribute(module, directory, trainer, order="average")


@pytest.mark.parametrize("options", [{"gradient_clip_val": 0.4}, {"accumulate_grad_batches": 2}])
def test_many_targets_are_as_each_alone(options: dict[str, Any], tmp_path: Path) -> None:
    """The gradients of a step, which are kept for the window, may share memory with cotangents of the momentum."""
    module, targets = Net(optimizer=sgd(lr=0.1, momentum=0.9)), make_data(9, seed=5)
    trainer = train(module, DATA, tmp_path, **options)
    scores = attribute(module, tmp_path, trainer, targets, order="average")
    for number in (0, 8):
        alone = attribute(module, tmp_path, trainer, Subset(targets, [number]), order="average")
        torch.testing.assert_close(scores[[number]], alone, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("options", [{"block_size": 2}, {"micro_batch_size": 3}])
def test_blocks_do_not_matter(options: dict[str, int], recorded: Any) -> None:
    module, directory, trainer, scores = recorded
    found = attribute(module, directory, trainer, order="average", **options)
    torch.testing.assert_close(found, scores, rtol=1e-10, atol=1e-13)


def test_spacing_does_not_matter(recorded: Any, tmp_path: Path) -> None:
    *_, scores = recorded
    module = Net(optimizer=sgd(momentum=0.9))
    trainer = train(module, DATA, tmp_path, max_epochs=3, spacing=100)
    torch.testing.assert_close(attribute(module, tmp_path, trainer, order="average"), scores, rtol=1e-10, atol=1e-13)


@pytest.mark.filterwarnings("ignore:.*batch normalization")
@pytest.mark.parametrize("net", ["dropout", "batch norm"])
def test_random_numbers_and_statistics_of_batches(net: str, tmp_path: Path) -> None:
    module = Net(NETS[net], sgd(lr=0.1))
    trainer = train(module, DATA, tmp_path)
    state, before = torch.get_rng_state(), copy.deepcopy(module.state_dict())
    first = attribute(module, tmp_path, trainer, order="average")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    torch.manual_seed(5)
    assert torch.equal(attribute(module, tmp_path, trainer, order="average"), first)
    other = attribute(module, tmp_path, trainer)
    assert torch.corrcoef(torch.stack([first.flatten(), other.flatten()]))[0, 1] > 0.5


def test_an_example_without_a_derivative(tmp_path: Path) -> None:
    class Skips(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss if loss.isfinite() else None

    inputs, *rest = DATA.tensors
    data = TensorDataset(inputs.index_fill(0, torch.tensor([7]), torch.nan), *rest)
    module = Skips()
    trainer = train(module, data, tmp_path)
    options: dict[str, Any] = {"check_smooth": False, "progress_bar": False}
    with pytest.raises(ValueError, match=r"training example 7 are not finite .* take order='recorded'"):
        Metagradient(module, tmp_path, order="average", **options).attribute(trainer, data, TARGETS)
    assert Metagradient(module, tmp_path, **options).attribute(trainer, data, TARGETS).isfinite().all()


def test_other_orders_are_refused(recorded: Any) -> None:
    module, directory, *_ = recorded
    with pytest.raises(ValueError, match="order must be one of 'recorded', 'average'; got 'random'"):
        Metagradient(module, directory, order="random")  # type: ignore[arg-type]
    assert "average" in repr(Metagradient(module, directory, order="average"))


def test_sums_of_targets_and_examples(recorded: Any) -> None:
    module, directory, trainer, scores = recorded
    method = Metagradient(module, directory, order="average", check_smooth=False, progress_bar=False)
    groups = [0, 0, 0, 1, 1, 1, 1, 1, 1, 2, 2, 2]
    found = method.attribute(trainer, DATA, TARGETS, aggregate="mean", train_groups=groups)
    expected = torch.stack([scores[:, :3].sum(1), scores[:, 3:9].sum(1), scores[:, 9:].sum(1)], 1).mean(0)
    torch.testing.assert_close(found[0], expected)
