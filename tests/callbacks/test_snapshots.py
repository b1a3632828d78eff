"""When TRAKCallback saves, and what."""

from __future__ import annotations

import json
import uuid
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, WeightAveraging

from lightning_trak.callbacks.snapshots import TRAKCallback
from lightning_trak.checkpoints.reading import resolve_checkpoints
from lightning_trak.checkpoints.series import SnapshotSeries
from tests.callback_nets import History, Net, TwoOptimizers, epochs, fit, steps

# --- when ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [4, 8, 12]),
        ({"every_n_epochs": 2}, [8, 12]),
        ({"every_n_epochs": 2, "save_last": False}, [8]),
        ({"every_n_train_steps": 5}, [5, 10, 12]),
        ({"every_n_train_steps": 5, "save_last": False}, [5, 10]),
        ({"every_n_train_steps": 4}, [4, 8, 12]),
        ({"train_time_interval": timedelta(0)}, list(range(1, 13))),
        ({"train_time_interval": timedelta(days=1)}, [12]),
        ({"train_time_interval": timedelta(days=1), "save_last": False}, []),
    ],
)
def test_triggers(options: dict[str, Any], expected: list[int], tmp_path: Path) -> None:
    history = History()
    fit(history, TRAKCallback(tmp_path, **options))
    assert steps(tmp_path) == expected
    for checkpoint in resolve_checkpoints(tmp_path) if expected else []:
        weights = checkpoint.load()
        true = history.weights[checkpoint.record.step]
        assert weights.keys() == true.keys()
        assert all(torch.equal(weights[name], true[name]) for name in true)
        Net().load_state_dict(weights)


def test_integers_of_numpy_have_the_state_of_others(tmp_path: Path) -> None:
    for name in ("every_n_epochs", "every_n_train_steps"):
        one, other = (TRAKCallback(tmp_path, **{name: number}) for number in (5, np.int64(5)))
        assert one.state_key == other.state_key


def test_epochs_count_those_completed(tmp_path: Path) -> None:
    fit(TRAKCallback(tmp_path / "epochs"), TRAKCallback(tmp_path / "steps", every_n_train_steps=6))
    assert epochs(tmp_path / "epochs") == [1, 2, 3]
    assert list(zip(steps(tmp_path / "steps"), epochs(tmp_path / "steps"), strict=True)) == [(6, 1), (12, 2)]


@pytest.mark.parametrize(
    ("interval", "accumulate", "expected"),
    [(3.5, 1, [4, 8, 12]), (4.5, 3, [3, 6])],  # steps after batches 3, 4, 7, 8, 11 and 12: due at 5, saved after 7
)
def test_time_trigger_counts_from_the_last_save(
    interval: float, accumulate: int, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock(Callback):
        now = 0.0

        def on_train_batch_start(self, *args: Any) -> None:
            self.now += 1.0

    clock = Clock()
    # the callback's own name for the module, so that Lightning's timers keep their clock
    monkeypatch.setattr("lightning_trak.callbacks.snapshots.time", SimpleNamespace(monotonic=lambda: clock.now))
    callback = TRAKCallback(tmp_path, train_time_interval=timedelta(seconds=interval), save_last=False)
    fit(clock, callback, accumulate_grad_batches=accumulate)
    assert steps(tmp_path) == expected


@pytest.mark.parametrize("trigger", [{"every_n_train_steps": 1}, {"train_time_interval": timedelta(0)}])
def test_gradient_accumulation_saves_a_step_once(
    trigger: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = []
    save = SnapshotSeries.save
    monkeypatch.setattr(SnapshotSeries, "save", lambda self, *args: saved.append(args[1]) or save(self, *args))
    history = History()
    fit(history, TRAKCallback(tmp_path, **trigger), accumulate_grad_batches=3)
    assert saved == steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert 0 in history.weights  # batches before the first step, which were not saved
    for checkpoint in resolve_checkpoints(tmp_path):
        true = history.weights[checkpoint.record.step]
        assert all(torch.equal(tensor, true[name]) for name, tensor in checkpoint.load().items())


def test_steps_of_several_optimizers_are_counted_together(tmp_path: Path) -> None:
    fit(TRAKCallback(tmp_path, every_n_train_steps=3), module=TwoOptimizers())
    assert steps(tmp_path) == [4, 6, 10, 12, 16, 18, 22, 24]  # 24 steps, two a batch


def test_last_step_of_a_run_that_is_cut_short(tmp_path: Path) -> None:
    fit(TRAKCallback(tmp_path, every_n_epochs=2), max_steps=6, max_epochs=-1)
    assert steps(tmp_path) == [6]


def test_sanity_checking_saves_nothing(tmp_path: Path) -> None:
    class Probe(Callback):
        def on_sanity_check_end(self, *args: Any) -> None:
            self.seen = list(tmp_path.iterdir())

    probe = Probe()
    fit(TRAKCallback(tmp_path, every_n_train_steps=1), probe, num_sanity_val_steps=2)
    assert probe.seen == []
    assert steps(tmp_path)[0] == 1


def test_fast_dev_run_writes_nothing(tmp_path: Path) -> None:
    fit(TRAKCallback(tmp_path / "run", every_n_train_steps=1), fast_dev_run=True)
    assert not (tmp_path / "run").exists()


def test_nothing_is_saved_without_optimizer_steps(tmp_path: Path) -> None:
    fit(TRAKCallback(tmp_path), limit_train_batches=0)
    module = TwoOptimizers()
    module.training_step = lambda batch, batch_idx: None  # type: ignore[method-assign]
    fit(TRAKCallback(tmp_path), module=module)
    assert steps(tmp_path) == []


# --- what ---------------------------------------------------------------------------------------------------------


def test_manifest_records_every_parameter_group(tmp_path: Path) -> None:
    fit(TRAKCallback(tmp_path), max_epochs=1)
    content = json.loads((tmp_path / "manifest.json").read_text())
    weights, biases = ["encode.weight", "norm.weight", "head.weight"], ["encode", "norm", "decode", "head"]
    biases = [f"{layer}.bias" for layer in biases]
    assert content["snapshots"][0]["parameter_groups"] == [
        {"optimizer": 0, "algorithm": "SGD", "lr": 0.1, "weight_decay": 0.01, "parameters": weights},
        {"optimizer": 0, "algorithm": "SGD", "lr": 0.02, "weight_decay": 0.0, "parameters": biases},
    ]


@pytest.mark.parametrize("validation", [True, False])  # with it, Lightning steps schedulers before an epoch's end
@pytest.mark.parametrize(("interval", "halvings"), [("epoch", [0, 0, 1, 1, 2, 2]), ("step", [1, 3, 5, 7, 9, 11])])
def test_recorded_learning_rate_is_that_of_the_last_step(
    interval: str, halvings: list[int], validation: bool, tmp_path: Path
) -> None:
    class Scheduled(Net):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}

    options = {} if validation else {"limit_val_batches": 0}
    fit(
        TRAKCallback(tmp_path / "a", every_n_train_steps=2), TRAKCallback(tmp_path / "b"), module=Scheduled(), **options
    )
    for name, expected in (("a", halvings), ("b", halvings[1::2])):
        for snapshot, power in zip(SnapshotSeries(tmp_path / name).read().snapshots, expected, strict=True):
            found = [group.lr for group in snapshot.parameter_groups]
            assert found == pytest.approx([0.1 / 2**power, 0.02 / 2**power])


def test_manifest_tells_optimizers_apart(tmp_path: Path) -> None:
    fit(TRAKCallback(tmp_path), module=TwoOptimizers(), max_epochs=1)
    groups = SnapshotSeries(tmp_path).read().snapshots[0].parameter_groups
    found = [(group.optimizer, group.algorithm, group.lr, group.weight_decay) for group in groups]
    assert found == [(0, "AdamW", 0.1, 0.01), (1, "Rprop", 0.2, None)]


def test_learning_rates_that_are_tensors(tmp_path: Path) -> None:
    class Capturable(Net):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=torch.tensor(0.25))

    fit(TRAKCallback(tmp_path), module=Capturable(), max_epochs=1)
    assert SnapshotSeries(tmp_path).read().snapshots[0].parameter_groups[0].lr == 0.25


def test_raw_weights_are_saved_beside_averaging(tmp_path: Path) -> None:
    history = History()
    module = Net()
    fit(
        TRAKCallback(tmp_path),
        history,
        WeightAveraging(avg_fn=lambda mean, new, n: (mean * n + new) / (n + 1)),
        module=module,
    )
    for checkpoint in resolve_checkpoints(tmp_path):
        true = history.weights[checkpoint.record.step]
        assert all(torch.equal(tensor, true[name]) for name, tensor in checkpoint.load().items())
    assert not torch.equal(module.head.weight, true["head.weight"])  # the average has taken its place since


def test_training_is_the_same_with_the_callback(tmp_path: Path) -> None:
    alone, watched = Net(), Net()
    fit(module=alone)
    fit(TRAKCallback(tmp_path, every_n_train_steps=1), module=watched)
    for name, tensor in alone.state_dict().items():
        assert torch.equal(tensor, watched.state_dict()[name]), name


def test_remote_directory() -> None:
    directory = f"memory://{uuid.uuid4().hex}/snapshots"
    history = History()
    fit(history, TRAKCallback(directory))
    assert steps(directory) == [4, 8, 12]
    for checkpoint in resolve_checkpoints(directory):
        true = history.weights[checkpoint.record.step]
        assert all(torch.equal(tensor, true[name]) for name, tensor in checkpoint.load().items())


def test_relative_directory_is_settled_when_fit_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wanders(Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            (tmp_path / f"{trainer.current_epoch}").mkdir()
            monkeypatch.chdir(tmp_path / f"{trainer.current_epoch}")

    monkeypatch.chdir(tmp_path)
    fit(TRAKCallback("run"), Wanders())
    assert steps(tmp_path / "run") == [4, 8, 12]


# --- arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_epochs": 1, "every_n_train_steps": 2}, "every_n_epochs and every_n_train_steps"),
        ({"every_n_epochs": 1, "train_time_interval": timedelta(1)}, "every_n_epochs and train_time_interval"),
        ({"every_n_epochs": 0}, "Expected `every_n_epochs` to be a positive integer but got 0"),
        ({"every_n_train_steps": -1}, "Expected `every_n_train_steps` to be a positive integer but got -1"),
        ({"every_n_train_steps": 2.5}, "Expected `every_n_train_steps` to be a positive integer but got 2.5"),
        ({"train_time_interval": timedelta(seconds=-1)}, "train_time_interval must not be negative, got -1 day"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        TRAKCallback(tmp_path, **options)


def test_an_interval_in_seconds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"a datetime\.timedelta, such as timedelta\(minutes=30\), got 1800"):
        TRAKCallback(tmp_path, train_time_interval=cast(timedelta, 1800))


def test_partitioned_weights_are_refused(tmp_path: Path) -> None:
    trainer = SimpleNamespace(strategy=SimpleNamespace(zero_stage_3=True), fast_dev_run=0, callbacks=[])
    with pytest.raises(RuntimeError, match="ZeRO stage 3"):
        TRAKCallback(tmp_path).setup(trainer, Net(), "fit")


def test_the_default_checkpoints_of_lightning_are_kept(tmp_path: Path) -> None:
    trainer = fit(TRAKCallback(tmp_path / "run"), enable_checkpointing=True, default_root_dir=tmp_path, max_epochs=1)
    assert isinstance(trainer.checkpoint_callback, ModelCheckpoint)
