"""Recorded runs trained again with other weights: against training by hand, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_trak.replay.losses import declared_losses
from lightning_trak.replay.player import Player
from lightning_trak.replay.recording.reading import Recording
from lightning_trak.replay.recording.states import TrainingState
from lightning_trak.replay.reweighted import Reweighted
from tests.methods.metagradients import DATA, NETS, OPTIMIZERS, TARGETS, outputs
from tests.replay.runs import NUM_TRAIN, Net, train

WEIGHTS = torch.rand(NUM_TRAIN, generator=torch.Generator().manual_seed(4)).mul(2).double()
WEIGHTS[[1, 5]] = 0.0


def reweighted(module: Any, directory: Path, data: Any = DATA, losses: Any = None) -> Reweighted:
    losses = declared_losses(module.configure_model_output(), losses)
    loader = DataLoader(data, batch_size=4)
    return Reweighted(Player(module, Recording(directory), loader, None, torch.device("cpu")), losses)


def require_trained_by_hand(make: Any, directory: Path, **options: Any) -> None:
    recorded = make()
    train(recorded, DATA, directory, **options)
    run = reweighted(make(), directory)
    final = run.train(torch.ones(NUM_TRAIN))
    last = run.recording.state(run.recording.num_steps)
    for name, tensor in final.tensors():
        torch.testing.assert_close(tensor, dict(last.tensors())[name], rtol=1e-9, atol=1e-12)
    by_hand = make()
    by_hand.weights = WEIGHTS
    train(by_hand, DATA, **options)
    run.train(WEIGHTS)
    for name, parameter in by_hand.named_parameters():
        torch.testing.assert_close(run.player.parameters[name], parameter, rtol=1e-9, atol=1e-12)
    found = run.outputs(recorded.configure_model_output(), DataLoader(TARGETS, batch_size=2), None)
    torch.testing.assert_close(found, outputs(by_hand), rtol=1e-8, atol=1e-10)
    assert (found - outputs(recorded)).abs().min() > 1e-4


@pytest.mark.parametrize("name", ["sgd", "nesterov", "adamw", "groups", "schedule"])
def test_optimizers(name: str, tmp_path: Path) -> None:
    require_trained_by_hand(lambda: Net(optimizer=OPTIMIZERS[name]), tmp_path)


@pytest.mark.parametrize("net", ["dropout", "batch norm", "attention", "tied, frozen and unused weights"])
def test_nets(net: str, tmp_path: Path) -> None:
    require_trained_by_hand(lambda: Net(NETS[net]), tmp_path)


@pytest.mark.parametrize(
    "options",
    [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.3}, {"gradient_clip_val": 0.05, "spacing": "log"}],
)
def test_accumulation_and_clipping(options: dict[str, Any], tmp_path: Path) -> None:
    require_trained_by_hand(Net, tmp_path, **options)


def test_batches_that_training_skips(tmp_path: Path) -> None:
    class Skipping(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    require_trained_by_hand(Skipping, tmp_path, accumulate_grad_batches=2)


def test_weights_of_single_precision_runs_are_not_rounded_apart(tmp_path: Path) -> None:
    train(Net(), DATA, tmp_path, precision="32-true")
    run = reweighted(Net(), tmp_path)
    final = run.train(torch.ones(NUM_TRAIN))
    for name, tensor in run.recording.state(6).parameters.items():
        torch.testing.assert_close(final.parameters[name], tensor, rtol=1e-4, atol=1e-6)


def test_trainings_do_not_depend_on_each_other(tmp_path: Path) -> None:
    module = Net(NETS["batch norm"], OPTIMIZERS["adamw"])
    before = copy.deepcopy(module.state_dict())
    train(module, DATA, tmp_path)
    module.load_state_dict(before)
    run = reweighted(module, tmp_path)
    first = run.train(WEIGHTS)
    run.outputs(module.configure_model_output(), DataLoader(TARGETS), None)
    run.train(torch.zeros(NUM_TRAIN))
    again, alone = run.train(WEIGHTS), reweighted(module, tmp_path).train(WEIGHTS)
    for state in (again, alone):
        assert_same(state, first)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def assert_same(state: TrainingState, other: TrainingState) -> None:
    found = dict(other.tensors())
    assert all(torch.equal(tensor, found[name]) for name, tensor in state.tensors())


class Penalty(Net):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 0.01 * self.net[0].weight.square().sum()


class Hidden(Net):
    """Adds a penalty to the gradient that the loss does not show."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        penalty = 0.01 * self.net[0].weight.square().sum()
        return super().training_step(batch, batch_idx) + penalty - penalty.detach()


def test_other_losses_are_refused(tmp_path: Path) -> None:
    train(Penalty(), DATA, tmp_path / "penalty")
    with pytest.raises(ValueError, match=r"training_step returned .* micro-batch 0 of step 0, .* losses="):
        reweighted(Penalty(), tmp_path / "penalty").train(WEIGHTS)
    train(Hidden(), DATA, tmp_path / "hidden")
    with pytest.raises(ValueError, match="step 0 moved the weights by"):
        reweighted(Hidden(), tmp_path / "hidden").train(WEIGHTS)
    mean = lambda module, batch: F.cross_entropy(module(batch[0]), batch[1])  # noqa: E731
    with pytest.raises(ValueError, match="one training loss per example"):
        reweighted(Penalty(), tmp_path / "penalty", losses=mean).train(WEIGHTS)


def test_bad_weights_are_refused(tmp_path: Path) -> None:
    train(Net(), DATA, tmp_path)
    run = reweighted(Net(), tmp_path)
    with pytest.raises(ValueError, match=r"shape \(12,\), received \(13,\)"):
        run.train(torch.ones(13))
    with pytest.raises(ValueError, match="1 of them are not"):
        run.train(torch.where(torch.arange(NUM_TRAIN) == 3, torch.nan, 1.0))


def test_outputs_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    train(Net(optimizer=OPTIMIZERS["sgd"]), DATA, tmp_path)
    run = reweighted(Net(), tmp_path)
    run.train(torch.full((NUM_TRAIN,), 1e200, dtype=torch.float64))
    with pytest.raises(ValueError, match="the output at target 0 is nan"):
        run.outputs(Net().configure_model_output(), DataLoader(TARGETS), None)
