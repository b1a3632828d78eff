"""Metagradients: the same for any spacing and block, of what training minimizes, and bad input."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import Metagradient
from lightning_trak.outputs import ClassificationMargin, ModelOutput, NegativeLoss
from lightning_trak.replay import Recording
from tests.callback_nets import make_trainer
from tests.methods.metagradients import (
    DATA,
    NETS,
    OPTIMIZERS,
    TARGETS,
    Linear,
    attribute,
    layers,
    require_derivative,
    sgd,
)
from tests.replay.runs import NUM_TRAIN, Net, make_data, shuffled, train

# --- the same scores ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Net, Path, L.Trainer, Tensor]:
    directory, module = tmp_path_factory.mktemp("recorded"), Net(optimizer=OPTIMIZERS["adam"])
    trainer = train(module, DATA, directory, max_epochs=4)
    return module, directory, trainer, attribute(module, directory, trainer)


@pytest.mark.parametrize("spacing", ["log", 1, 5, 100])
def test_spacing_does_not_matter(spacing: Any, recorded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = train(Net(optimizer=OPTIMIZERS["adam"]), DATA, tmp_path, spacing, max_epochs=4)
    assert torch.equal(attribute(Net(), tmp_path, trainer), recorded[3])
    monkeypatch.setattr("lightning_trak.replay.reverse.run.SEGMENT_BYTES", 1)  # as few states in memory as possible
    assert torch.equal(attribute(Net(), tmp_path, trainer), recorded[3])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"block_size": 1}, {"block_size": 2}, {"micro_batch_size": 1}, {"micro_batch_size": 3}]
)
def test_blocks_do_not_matter(options: dict[str, int], recorded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, directory, trainer, expected = recorded
    torch.testing.assert_close(attribute(module, directory, trainer, **options), expected, rtol=1e-10, atol=1e-13)
    monkeypatch.setattr("lightning_trak.replay.reverse.run.COTANGENT_BYTES", 1)  # a reverse pass for each target
    torch.testing.assert_close(attribute(module, directory, trainer, **options), expected, rtol=1e-10, atol=1e-13)


def test_order_and_batches_of_the_loaders_do_not_matter(recorded: Any) -> None:
    module, directory, trainer, expected = recorded
    method = Metagradient(module, directory, progress_bar=False)
    found = method.attribute(trainer, shuffled(DATA, 7), DataLoader(TARGETS, batch_size=2))
    assert torch.equal(found, expected)


@pytest.mark.slow
def test_parts_of_the_run_add_up(recorded: Any, tmp_path: Path) -> None:
    module, directory, trainer, expected = recorded
    parts = [attribute(module, directory, trainer, last_steps=steps) for steps in range(1, 13)]
    assert torch.equal(parts[-1], expected)
    last = Recording(directory).record(11).micro_batches[0].positions
    assert sorted(parts[0].abs().sum(0).nonzero().flatten().tolist()) == sorted(last)
    # Training from the state in the middle, recorded as a run of its own, has the scores of the last steps.
    module = Net(optimizer=OPTIMIZERS["sgd"])
    middle = Net(optimizer=OPTIMIZERS["sgd"])
    order = lambda data: DataLoader(data, batch_size=4)  # noqa: E731
    trainer = train(module, DATA, tmp_path / "whole", loader=order)
    train(middle, DATA, loader=order, max_epochs=1)
    train(middle, DATA, tmp_path / "half", loader=order, max_epochs=1)
    half = attribute(module, tmp_path / "whole", trainer, last_steps=3)
    torch.testing.assert_close(attribute(middle, tmp_path / "half", trainer), half, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("order", ["recorded", "average"])
@pytest.mark.parametrize("last_steps", [None, 2])
def test_first_steps_are_a_shorter_run(order: str, last_steps: int | None, recorded: Any, tmp_path: Path) -> None:
    module, directory, trainer, _ = recorded
    train(Net(optimizer=OPTIMIZERS["adam"]), DATA, tmp_path, max_epochs=2)
    assert 6 not in Recording(directory).state_steps
    options = {"order": order, "last_steps": last_steps}
    assert torch.equal(
        attribute(module, directory, trainer, first_steps=6, **options), attribute(module, tmp_path, trainer, **options)
    )


def test_with_the_average_order_examples_count_that_come_later(recorded: Any) -> None:
    module, directory, trainer, _ = recorded
    early = {place for micro in Recording(directory).record(0).micro_batches for place in micro.positions}
    own = attribute(module, directory, trainer, first_steps=1)
    assert set(own.abs().sum(0).nonzero().flatten().tolist()) == early
    average = attribute(module, directory, trainer, first_steps=1, order="average")
    assert len(early) < NUM_TRAIN == len(average.abs().sum(0).nonzero())


def test_float32_agrees_with_float64(tmp_path: Path) -> None:
    found = []
    for precision in ("32-true", "64-true"):
        module = Net(optimizer=OPTIMIZERS["nesterov"])
        trainer = train(module, DATA, tmp_path / precision, precision=precision)
        found.append(attribute(module, tmp_path / precision, trainer))
    assert [scores.dtype for scores in found] == [torch.float32, torch.float64]
    torch.testing.assert_close(found[0].double(), found[1], rtol=1e-3, atol=1e-5)


def test_nothing_of_the_user_is_touched(tmp_path: Path) -> None:
    module = Net(lambda: layers(nn.BatchNorm1d(6), nn.Dropout(0.2)), OPTIMIZERS["adam"])
    trainer = train(module, DATA, tmp_path)
    module.net[1].eval()
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    tensors = copy.deepcopy(module.state_dict())
    modes, attributes = [part.training for part in module.modules()], dict(vars(module))
    flags = [parameter.requires_grad for parameter in module.parameters()]
    held = dict(vars(trainer))
    state, default = torch.get_rng_state(), torch.get_default_dtype()
    with pytest.warns(UserWarning, match="example with weight 0 is still part of the batch's statistics"):
        attribute(module, tmp_path, trainer)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == default
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in module.state_dict().items())
    assert all(bool((parameter.grad == 1).all()) for parameter in module.parameters())
    assert [part.training for part in module.modules()] == modes
    assert [parameter.requires_grad for parameter in module.parameters()] == flags
    assert dict(vars(module)) == attributes
    assert dict(vars(trainer)) == held
    assert type(module) is Net
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


# --- what training minimizes --------------------------------------------------------------------------------------


class Penalty(Net):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 0.01 * self.net[0].weight.square().sum()


class Squared(Linear):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.mse_loss(self(batch[0]).squeeze(-1), batch[1])


def test_other_losses_are_refused_and_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Penalty()
    trainer = train(module, DATA, tmp_path / "penalty")
    with monkeypatch.context() as patch:  # before the longer work of the check whether the run is smooth
        patch.setattr("lightning_trak.methods.metagradient.quick_value", None)
        method = Metagradient(module, tmp_path / "penalty", progress_bar=False)
        with pytest.raises(ValueError, match="training_step returned"):
            method.attribute(trainer, DATA, TARGETS)
    with pytest.raises(ValueError, match=r"training_step returned .* the mean of the examples' losses is .*losses="):
        attribute(module, tmp_path / "penalty", trainer)

    def losses(module: Any, batch: Any) -> Tensor:
        penalty = 0.01 * module.net[0].weight.square().sum()
        return F.cross_entropy(module(batch[0]), batch[1], reduction="none") + penalty

    assert attribute(module, tmp_path / "penalty", trainer, losses=losses).isfinite().all()


def test_another_factor_is_no_other_loss(tmp_path: Path) -> None:
    """RegressionOutput declares the half of the squared error, and most people train with all of it."""
    data = TensorDataset(torch.randn(6, 3), torch.randn(6))
    module = Squared()
    trainer = train(module, data, tmp_path)
    scores = Metagradient(module, tmp_path, progress_bar=False).attribute(trainer, data, data)
    method = Metagradient(
        module,
        tmp_path,
        losses=lambda module, batch: (module(batch[0]).squeeze(-1) - batch[1]).square(),
        progress_bar=False,
    )
    torch.testing.assert_close(scores, method.attribute(trainer, data, data))


def test_labels_from_a_wrong_part_of_the_batch_are_told(tmp_path: Path) -> None:
    module = Net()
    trainer = train(module, DATA, tmp_path / "recording")
    positions = ClassificationMargin(forward=lambda module, batch: module(batch[0]))  # the last part is not the labels
    with pytest.raises(ValueError, match=r"is NaN\. It is one of the training examples \d+, .*labels_key="):
        attribute(module, tmp_path / "recording", trainer, output=positions)


def test_gradients_that_a_hook_changes_are_noticed(tmp_path: Path) -> None:
    class Noise(L.Callback):
        def on_after_backward(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            if trainer.global_step:  # the first step is repeated at once
                for parameter in module.parameters():
                    parameter.grad.mul_(1.01)

    module = Net()
    trainer = train(module, DATA, tmp_path, callbacks=[Noise()])
    with pytest.raises(ValueError, match=r"cannot be repeated: before step 6, .* since step 4 .* hooks or callbacks"):
        attribute(module, tmp_path, trainer)


def test_buffers_that_training_changes_are_noticed(tmp_path: Path) -> None:
    class Averaging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, inputs: Tensor) -> Tensor:
            if self.training:
                with torch.no_grad():
                    self.mean.lerp_(inputs.mean(0), 0.1)
            return self.linear(inputs - self.mean)

    module = Net(Averaging)
    trainer = train(module, DATA, tmp_path)
    with pytest.raises(ValueError, match=r'changes the buffer "net\.mean"'):
        attribute(module, tmp_path, trainer)


def test_weights_that_a_forward_pass_changes_are_noticed(tmp_path: Path) -> None:
    class Codes(nn.Embedding):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward((inputs > 0).long()).sum(1)

    module = Net(lambda: nn.Sequential(Codes(2, 3, max_norm=0.5)))
    trainer = train(module, DATA, tmp_path)
    with pytest.raises(ValueError, match=r'changes the parameter "net\.0\.weight" in place'):
        attribute(module, tmp_path, trainer)


def test_gradients_through_detached_numbers_are_noticed(tmp_path: Path) -> None:
    class Focal(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return losses(self, batch).mean()

    def losses(module: Any, batch: Any) -> Tensor:
        found = F.cross_entropy(module(batch[0]), batch[1], reduction="none")
        return (1 - found.neg().exp()).detach().square() * found

    module = Focal()
    trainer = train(module, DATA, tmp_path)
    with pytest.raises(ValueError, match=r"another way than autograd's second derivatives say.*detach"):
        attribute(module, tmp_path, trainer, losses=losses)


def test_the_step_knows_where_it_is(tmp_path: Path) -> None:
    class Annealed(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.log("epoch", float(self.current_epoch))
            losses = super().training_step(batch, batch_idx)
            return losses * (1 + self.current_epoch + 0.1 * self.global_step + 0.01 * batch_idx)

    def losses(module: Any, batch: Any) -> Tensor:
        factor = 1 + module.current_epoch + 0.1 * module.global_step + 0.01 * (module.global_step % 3)
        return F.cross_entropy(module(batch[0]), batch[1], reduction="none") * factor

    module = Annealed()
    trainer = train(module, DATA, tmp_path)
    require_derivative(Annealed, attribute(module, tmp_path, trainer, losses=losses), {})

    class NeedsTrainer(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            later = self.trainer.max_epochs if self.current_epoch else 1
            return super().training_step(batch, batch_idx) * later

    module = NeedsTrainer()
    trainer = train(module, DATA, tmp_path / "trainer")
    with pytest.raises(ValueError, match=r"the module uses self\.trainer\.max_epochs"):
        attribute(module, tmp_path / "trainer", trainer)


# --- bad input ----------------------------------------------------------------------------------------------------


def test_what_does_not_fit_the_recording(recorded: Any, tmp_path: Path) -> None:
    module, directory, trainer, _ = recorded
    method = Metagradient(module, directory, progress_bar=False)
    with pytest.raises(ValueError, match="have 13 examples, but those of the recording had 12"):
        method.attribute(trainer, make_data(13), TARGETS)
    with pytest.raises(ValueError, match="not those of the recording, judged by eight examples"):
        method.attribute(trainer, make_data(seed=7), TARGETS)
    with pytest.raises(ValueError, match="is not the module of the recording: shapes"):
        attribute(Net(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))), directory, trainer)
    with pytest.raises(ValueError, match=r"not the module of the recording: parameters are net\.1\.bias"):
        attribute(Net(lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))), directory, trainer)
    nan = TensorDataset(torch.full((1, 4), float("nan")), torch.zeros(1, dtype=torch.int64), torch.zeros(1))
    with pytest.raises(ValueError, match="output at target 0 is nan"):
        attribute(module, directory, trainer, nan)
    with pytest.raises(ValueError, match=r"last_steps is 13, but the run in .* has 12 steps; take a smaller number"):
        attribute(module, directory, trainer, last_steps=13)
    with pytest.raises(ValueError, match=r"first_steps is 13, but the run in .* has 12 steps; take a smaller number"):
        attribute(module, directory, trainer, first_steps=13)
    with pytest.raises(ValueError, match=r"last_steps is 5, but the run in .* has 4 steps; take a smaller number"):
        attribute(module, directory, trainer, first_steps=4, last_steps=5)
    for name in ("first_steps", "last_steps", "block_size", "micro_batch_size"):
        with pytest.raises(ValueError, match=f"`{name}` to be a positive integer"):
            attribute(module, directory, trainer, **{name: 0})
    with pytest.raises(FileNotFoundError, match="is not a directory that TrainingRecorder has written"):
        Metagradient(module, tmp_path)
    with pytest.raises(ValueError, match="one training loss per example"):
        attribute(module, directory, trainer, losses=lambda module, batch: F.cross_entropy(module(batch[0]), batch[1]))
    output = NegativeLoss(lambda module, batch: F.cross_entropy(module(batch[0]), batch[1], reduction="none"))
    assert attribute(module, directory, trainer, output=output).shape == (3, 12)


def test_several_runs(tmp_path: Path) -> None:
    """Scores are the mean over runs; bad input is refused before any of them is differentiated."""
    directories = [tmp_path / "first", tmp_path / "second"]
    for seed, directory in enumerate(directories):
        torch.manual_seed(seed)
        module = Net()
        trainer = train(module, DATA, directory, max_epochs=2 + seed)
    alone = [attribute(module, directory, trainer) for directory in directories]
    assert (alone[0] - alone[1]).norm() > 1e-3 * alone[0].norm()
    torch.testing.assert_close(attribute(module, directories, trainer), (alone[0] + alone[1]) / 2)
    last = [attribute(module, directory, trainer, last_steps=3) for directory in directories]
    torch.testing.assert_close(attribute(module, directories, trainer, last_steps=3), (last[0] + last[1]) / 2)
    with pytest.raises(ValueError, match="recording is empty"):
        Metagradient(module, [])
    with pytest.raises(ValueError, match="names a directory twice"):
        Metagradient(module, [directories[0], str(tmp_path / "second" / ".." / "first")])
    steps = Recording(directories[0]).num_steps
    with pytest.raises(ValueError, match=rf'the run in ".*first" has {steps} steps'):
        Metagradient(module, directories[::-1], last_steps=steps + 1)


def test_a_run_that_diverges(tmp_path: Path) -> None:
    module = Net(optimizer=sgd(lr=1e10, momentum=0.9))
    trainer = train(module, DATA, tmp_path, precision="32-true", max_epochs=4)
    with pytest.raises(ValueError, match=r"derivatives are not finite at step \d+: .* smaller learning rate"):
        attribute(module, tmp_path, trainer)


class Words(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return NUM_TRAIN

    def __getitem__(self, index: int) -> dict[str, Any]:
        inputs, labels, _ = DATA[index]
        return {"inputs": inputs, "labels": labels, "name": f"example {index}"}


class Reader(Net):
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        labels = batch.pop("labels")
        return {"loss": F.cross_entropy(self.net(batch["inputs"]), labels)}

    def configure_model_output(self) -> ModelOutput:
        return ClassificationMargin(forward=lambda module, batch: module.net(batch["inputs"]))


def test_batches_with_texts_that_training_changes(tmp_path: Path) -> None:
    module = Reader()
    trainer = train(module, Words(), tmp_path)
    method = Metagradient(module, tmp_path, progress_bar=False)
    scores = method.attribute(trainer, Words(), Words())
    plain = Net()
    other = train(plain, DATA, tmp_path / "plain")
    torch.testing.assert_close(scores, attribute(plain, tmp_path / "plain", other, DATA), rtol=1e-10, atol=1e-13)
    small = Metagradient(module, tmp_path, progress_bar=False, micro_batch_size=3).attribute(trainer, Words(), Words())
    torch.testing.assert_close(small, scores, rtol=1e-10, atol=1e-13)


def test_batches_that_training_skips(tmp_path: Path) -> None:
    class Skipping(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    module, options = Skipping(optimizer=sgd(momentum=0.9)), {"accumulate_grad_batches": 2}
    trainer = train(module, DATA, tmp_path, **options)
    make = lambda: Skipping(optimizer=sgd(momentum=0.9))  # noqa: E731
    require_derivative(make, attribute(module, tmp_path, trainer), options)


@pytest.mark.parametrize("net", ["dropout", "batch norm"])
def test_batches_that_cannot_be_cut(net: str, tmp_path: Path) -> None:
    module = Net(NETS[net])
    trainer = train(module, DATA, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*batch normalization.*")
        with pytest.raises(ValueError, match="micro_batch_size cuts a batch"):
            attribute(module, tmp_path, trainer, micro_batch_size=2)


def test_a_trainer_of_any_kind_will_do(recorded: Any) -> None:
    module, directory, _, expected = recorded
    assert torch.equal(attribute(module, directory, make_trainer(fast_dev_run=True)), expected)
