"""What TrainingRecorder records, and how it continues."""

from __future__ import annotations

import copy
import os
import random
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    SequentialSampler,
    Subset,
    WeightedRandomSampler,
    default_collate,
)

from lightning_trak.replay import Recording, replay
from tests.launch import run_module
from tests.replay.runs import Net, Thaw, make_data, sgd_of_trained, shuffled, train

DATA = make_data()


class Seen(Callback):
    """The positions of the examples that the module got, of each batch, and the learning rates of each step."""

    def __init__(self) -> None:
        self.positions: list[list[int]] = []
        self.rates: list[float] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, *args: Any) -> None:
        self.positions.append(batch[2].tolist())

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


class Odd(BatchSampler):
    """Batches of two sizes, with repetitions."""

    def __init__(self) -> None:
        super().__init__(SequentialSampler(DATA), 3, False)

    def __iter__(self):
        order = torch.randperm(12).tolist()
        yield from (order[:5], [order[0], order[0], order[7]], order[5:])

    def __len__(self):
        return 3


def records(directory: Path) -> list[Any]:
    recording = Recording(directory)
    return [recording.record(step) for step in range(recording.num_steps)]


# --- what ---------------------------------------------------------------------------------------------------------


LOADERS = {
    "in order": lambda data: DataLoader(data, batch_size=5),
    "shuffled": shuffled,
    "drop last": lambda data: shuffled(data, 5, drop_last=True),
    "weighted": lambda data: DataLoader(data, batch_size=4, sampler=WeightedRandomSampler(torch.rand(12), 12)),
    "batch sampler": lambda data: DataLoader(data, batch_sampler=Odd()),
    "workers": lambda data: shuffled(data, num_workers=2, persistent_workers=True),
}


SLOW = {"workers": pytest.mark.slow}


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in LOADERS])
def test_positions_are_those_of_the_batches(name: str, tmp_path: Path) -> None:
    seen = Seen()
    trainer = train(Net(), DATA, tmp_path, loader=LOADERS[name], callbacks=[seen], max_epochs=3)
    found = records(tmp_path)
    assert [micro.positions for record in found for micro in record.micro_batches] == seen.positions
    assert [record.epoch for record in found] == sorted(list(range(3)) * (len(found) // 3))
    assert replay(Net(), tmp_path, trainer, DATA, progress_bar=False).identical


def test_a_batch_that_is_none_is_left_out(tmp_path: Path) -> None:
    def collate(examples: list[Any]) -> Any:
        return None if len(examples) == 3 else default_collate(examples)

    seen, loader = Seen(), DataLoader(DATA, batch_sampler=Odd(), collate_fn=collate)
    trainer = train(Net(), DATA, tmp_path, loader=lambda data: loader, callbacks=[seen])
    assert [micro.positions for record in records(tmp_path) for micro in record.micro_batches] == seen.positions
    assert replay(Net(), tmp_path, trainer, loader, progress_bar=False).identical


def test_recording_changes_nothing_about_training(tmp_path: Path) -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Linear(5, 3))

    alone, recorded = Net(net), Net(net)
    loader = shuffled(DATA)
    before = dict(vars(loader))
    train(alone, DATA)
    trainer = train(recorded, DATA, tmp_path, loader=lambda data: loader)
    assert all(map(torch.equal, alone.state_dict().values(), recorded.state_dict().values()))
    assert type(loader) is DataLoader
    assert vars(loader) == before
    assert trainer.fit_loop._data_source.instance is loader


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [("sqrt", [0, 1, 4, 9, 16, 18]), ("log", [0, 1, 2, 4, 8, 16, 18]), (5, [0, 5, 10, 15, 18]), (6, [0, 6, 12, 18])],
)
def test_full_states_and_where_they_are(spacing: Any, expected: list[int], tmp_path: Path) -> None:
    class States(Callback):
        def __init__(self) -> None:
            self.weights: dict[int, dict[str, Tensor]] = {}

        def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
            self.weights[trainer.global_step] = copy.deepcopy(module.state_dict())

    states, module = States(), Net()
    train(module, DATA, tmp_path, spacing, callbacks=[states], max_epochs=6)
    states.weights[18] = module.state_dict()
    recording = Recording(tmp_path)
    assert recording.state_steps == expected
    for step in expected:
        found = recording.state(step).parameters
        assert all(torch.equal(found[name], tensor) for name, tensor in states.weights[step].items())


def test_weights_that_are_replaced_at_the_end_are_told(tmp_path: Path) -> None:
    module, average = Net(), StochasticWeightAveraging(0.1, swa_epoch_start=1)
    with pytest.warns(UserWarning, match=r'"net.0.weight" were changed after the last .* weights of the last step'):
        train(module, DATA, tmp_path / "averaged", callbacks=[average], max_epochs=3)
    recording = Recording(tmp_path / "averaged")
    last = recording.state(recording.num_steps).parameters["net.0.weight"]
    assert not torch.equal(last, module.net[0].weight)

    class Renames(Callback):
        def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
            nn.utils.parametrizations.weight_norm(module.net[0])

    with pytest.warns(UserWarning, match='"net.0.weight" were changed after the last recorded step'):
        train(Net(), DATA, tmp_path / "renamed", callbacks=[Renames()])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*after the last recorded step")
        train(Net(), DATA, tmp_path / "plain")


def test_accumulation_clipping_and_schedules(tmp_path: Path) -> None:
    def optimizers(module: Net) -> Any:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), "interval": "step"}]

    seen = Seen()
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3, "gradient_clip_algorithm": "value"}
    train(Net(optimizer=optimizers), DATA, tmp_path, callbacks=[seen], **options)
    found = records(tmp_path)
    assert [len(record.micro_batches) for record in found] == [2, 1, 2, 1]
    assert [micro.batch_idx for record in found for micro in record.micro_batches] == [0, 1, 2, 0, 1, 2]
    assert [record.settings.groups[0]["lr"] for record in found] == seen.rates
    assert len(set(seen.rates)) == 4
    assert {(r.settings.accumulate, r.settings.clip, r.settings.clip_by) for r in found} == {(2, 0.3, "value")}


def test_random_states_of_all_generators(tmp_path: Path) -> None:
    class Noisy(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if batch_idx:
                loss = loss * (1 + torch.rand(())) * (1 + random.random()) * (1 + random.gauss(0, 0.1))
                loss = loss * (1 + np.random.rand()) * (1 + 0.1 * np.random.standard_normal())  # noqa: NPY002
            return loss

    trainer = train(Noisy(), DATA, tmp_path)
    drawn = [sorted(record.micro_batches[0].random_states) for record in records(tmp_path)]
    assert drawn == [[], ["numpy", "python", "torch"], ["numpy", "python", "torch"]] * 2
    assert replay(Noisy(), tmp_path, trainer, DATA, progress_bar=False).identical


def test_layers_that_thaw_and_modules_in_eval_mode(tmp_path: Path) -> None:
    class ThawAndEvaluate(Thaw):
        def finetune_function(self, module: L.LightningModule, epoch: int, optimizer: Any) -> None:
            super().finetune_function(module, epoch, optimizer)
            if epoch == 1:
                module.net[1].eval()

    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))

    trainer = train(Net(net, sgd_of_trained), DATA, tmp_path, callbacks=[ThawAndEvaluate()])
    structures = [record.structure for record in records(tmp_path)]
    assert [len(structure.groups) for structure in structures] == [1, 1, 1, 2, 2, 2]
    assert [structure.frozen for structure in structures] == [("net.0.weight", "net.0.bias")] * 3 + [()] * 3
    assert [structure.evaluating for structure in structures] == [()] * 3 + [("net.1",)] * 3
    assert replay(Net(net, sgd_of_trained), tmp_path, trainer, DATA, progress_bar=False).identical


def test_fast_dev_run_records_nothing(tmp_path: Path) -> None:
    train(Net(), DATA, tmp_path / "run", fast_dev_run=True)
    assert not (tmp_path / "run").exists()


# --- continued ----------------------------------------------------------------------------------------------------


def adam(module: Net) -> Any:
    return torch.optim.Adam(module.parameters(), lr=0.01)


@pytest.mark.parametrize(("spacing", "double"), [("sqrt", True), (1, True), (100, True), ("sqrt", False)])
def test_a_resumed_run(spacing: Any, double: bool, tmp_path: Path) -> None:
    def net() -> Net:
        # With precision="64-true", Lightning rounds the weights of a checkpoint to those of the new module.
        return Net(optimizer=adam).double() if double else Net(optimizer=adam)

    recorded, checkpoint = tmp_path / "run", tmp_path / "checkpoints/epoch=1.ckpt"
    saving = ModelCheckpoint(tmp_path / "checkpoints", "{epoch}", save_top_k=-1)
    train(net(), DATA, recorded, spacing, callbacks=[saving], max_epochs=3, enable_checkpointing=True)
    module = net()
    trainer = train(module, DATA, recorded, spacing, max_epochs=4, ckpt_path=checkpoint)
    recording = Recording(recorded)
    recording.require_finished()
    assert recording.num_steps == 12
    assert {0, 6, 12} <= set(recording.state_steps)
    assert [one["first"] for one in recording.manifest["environments"]] == [0, 6]
    found = replay(module, recorded, trainer, DATA, progress_bar=False)
    assert found.identical == double
    assert found.largest_difference < 1e-6
    with pytest.raises(ValueError, match="another num_train"):
        train(module, make_data(13), recorded, ckpt_path=checkpoint, max_epochs=5)
    with pytest.raises(ValueError, match="holds no recording of the steps before it"):
        train(module, DATA, tmp_path / "new", ckpt_path=checkpoint, max_epochs=5)


def test_a_second_call_of_fit(tmp_path: Path) -> None:
    module = Net()
    trainer = train(module, DATA, tmp_path)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, shuffled(DATA))
    assert Recording(tmp_path).num_steps == 9
    assert replay(module, tmp_path, trainer, DATA, progress_bar=False).identical
    with torch.no_grad():
        module.net[0].bias.add_(1)
    trainer.fit_loop.max_epochs = 4
    with pytest.raises(ValueError, match=r"net.0.bias is not as the recording has it"):
        trainer.fit(module, shuffled(DATA))


def test_a_run_that_ends_with_an_error(tmp_path: Path) -> None:
    class Fails(Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 4:
                raise ArithmeticError

    with pytest.raises(ArithmeticError):
        train(Net(), DATA, tmp_path, callbacks=[Fails()])
    recording = Recording(tmp_path)
    assert recording.num_steps == 4
    with pytest.raises(ValueError, match="4 steps of a run that has not ended"):
        recording.require_finished()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the harness forks")
def test_a_killed_run_continues_to_the_same_bits(tmp_path: Path) -> None:
    assert "identical" in run_module("tests.callbacks.recorder_harness", str(tmp_path))


def test_a_subset_is_a_dataset_of_its_own(tmp_path: Path) -> None:
    part = Subset(DATA, [3, 5, 7, 9])
    trainer = train(Net(), part, tmp_path)
    assert replay(Net(), tmp_path, trainer, part, progress_bar=False).identical
    with pytest.raises(ValueError, match="have 12 examples, but those of the recording had 4"):
        replay(Net(), tmp_path, trainer, DATA, progress_bar=False)
