from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import uuid
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, WeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak.callback import TRAKCallback
from lightning_trak.checkpoints import resolve_checkpoints
from lightning_trak.snapshots import SnapshotSeries

BATCHES = 4  # of an epoch


class Net(L.LightningModule):
    """Has a tied weight, a weight with strides of its own, and buffers that change while training."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encode = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.decode = nn.Linear(3, 3)
        self.decode.weight = self.encode.weight
        self.head = nn.Linear(3, 2)
        self.head.weight = nn.Parameter(torch.randn(3, 2).T)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.decode(self.norm(self.encode(x)).relu()))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).pow(2).mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self(batch[0])

    test_step = validation_step

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        biases = [parameter for name, parameter in self.named_parameters() if name.endswith("bias")]
        weights = [parameter for name, parameter in self.named_parameters() if not name.endswith("bias")]
        groups = [{"params": weights, "weight_decay": 0.01}, {"params": biases, "lr": 0.02}]
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


class TwoOptimizers(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self(batch[0]).pow(2).mean())
            optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(self.encode.parameters(), lr=0.1), torch.optim.Rprop(self.head.parameters(), lr=0.2)]


class History(Callback):
    """The true weights after each optimizer step; of gradient accumulation's batches, the first of a step."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        copied = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        self.weights.setdefault(trainer.global_step, copied)


def loader() -> DataLoader[Any]:
    data = torch.randn(4 * BATCHES, 3, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(data), batch_size=4)


def make_trainer(*callbacks: Callback, **options: Any) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(accelerator="cpu", devices=1, callbacks=list(callbacks), **(quiet | {"max_epochs": 3} | options))


def fit(*callbacks: Callback, module: L.LightningModule | None = None, **options: Any) -> L.Trainer:
    trainer = make_trainer(*callbacks, **options)
    trainer.fit(module or Net(), loader(), loader())
    return trainer


def steps(directory: str | Path) -> list[int]:
    return [snapshot.step for snapshot in SnapshotSeries(directory).read().snapshots]


def epochs(directory: str | Path) -> list[int]:
    return [snapshot.epoch for snapshot in SnapshotSeries(directory).read().snapshots]


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
    monkeypatch.setattr("lightning_trak.callback.time", SimpleNamespace(monotonic=lambda: clock.now))
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
    assert content["snapshots"][0]["parameter_groups"] == [
        {"optimizer": 0, "algorithm": "SGD", "lr": 0.1, "weight_decay": 0.01},
        {"optimizer": 0, "algorithm": "SGD", "lr": 0.02, "weight_decay": 0.0},
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


# --- which run ----------------------------------------------------------------------------------------------------


def test_a_new_run_is_refused_in_anothers_directory(tmp_path: Path) -> None:
    callback = TRAKCallback(tmp_path)
    fit(callback)
    before = (tmp_path / "manifest.json").read_bytes()
    for other in (TRAKCallback(tmp_path), callback):
        with pytest.raises(ValueError, match=f'"{tmp_path}" holds 3 snapshots of another run, up to step 12'):
            fit(other)
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_a_run_that_died_before_its_first_snapshot_can_start_over(tmp_path: Path) -> None:
    class Dies(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise RuntimeError("died")

    with pytest.raises(RuntimeError, match="died"):
        fit(TRAKCallback(tmp_path), Dies())
    fit(TRAKCallback(tmp_path))
    assert steps(tmp_path) == [4, 8, 12]


def test_fit_again_trains_on(tmp_path: Path) -> None:
    trainer = fit(TRAKCallback(tmp_path, every_n_train_steps=5))
    assert steps(tmp_path) == [5, 10, 12]
    trainer.fit_loop.max_epochs = 5
    trainer.fit(trainer.lightning_module, loader())
    assert steps(tmp_path) == [5, 10, 12, 15, 20]


@pytest.mark.parametrize("changed", [{}, {"every_n_train_steps": 2}])
def test_resume_continues_the_series(changed: dict[str, Any], tmp_path: Path) -> None:
    keep_all = ModelCheckpoint(tmp_path / "lightning", filename="{epoch}", save_top_k=-1)
    fit(TRAKCallback(tmp_path / "run", every_n_train_steps=3), keep_all, enable_checkpointing=True)
    assert steps(tmp_path / "run") == [3, 6, 9, 12]
    original = {c.record.step: c.fingerprint() for c in resolve_checkpoints(tmp_path / "run")}
    run = SnapshotSeries(tmp_path / "run").read().run

    trainer = make_trainer(TRAKCallback(tmp_path / "run", **(changed or {"every_n_train_steps": 3})), max_epochs=4)
    trainer.fit(Net(), loader(), ckpt_path=tmp_path / "lightning/epoch=1.ckpt", weights_only=True)
    assert steps(tmp_path / "run") == ([3, 6, 10, 12, 14, 16] if changed else [3, 6, 9, 12, 15, 16])
    resumed = {c.record.step: c.fingerprint() for c in resolve_checkpoints(tmp_path / "run")}
    assert all(resumed[step] == original[step] for step in original.keys() & resumed.keys())
    assert SnapshotSeries(tmp_path / "run").read().run == run


def test_resume_into_a_new_directory(tmp_path: Path) -> None:
    trainer = fit(TRAKCallback(tmp_path / "first"))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    for _ in range(2):  # the second time the directory is this run's
        trainer = make_trainer(TRAKCallback(tmp_path / "second"), max_epochs=5)
        trainer.fit(Net(), loader(), ckpt_path=tmp_path / "last.ckpt")
        assert steps(tmp_path / "second") == [16, 20]
    assert steps(tmp_path / "first") == [4, 8, 12]


def test_resume_of_another_run_is_refused(tmp_path: Path) -> None:
    fit(TRAKCallback(tmp_path / "first")).save_checkpoint(tmp_path / "first.ckpt")
    fit(max_epochs=2).save_checkpoint(tmp_path / "without.ckpt")
    fit(TRAKCallback(tmp_path / "second"))
    for name in ("first.ckpt", "without.ckpt"):
        trainer = make_trainer(TRAKCallback(tmp_path / "second"), max_epochs=5)
        with pytest.raises(ValueError, match="holds 3 snapshots of another run"):
            trainer.fit(Net(), loader(), ckpt_path=tmp_path / name)
    assert steps(tmp_path / "second") == [4, 8, 12]


def test_callback_state_is_primitive(tmp_path: Path) -> None:
    trainer = fit(TRAKCallback(tmp_path / "run", train_time_interval=timedelta(0)))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    states = [state for key, state in content["callbacks"].items() if key.startswith("TRAKCallback")]
    assert states == [{"run": SnapshotSeries(tmp_path / "run").read().run}]


@pytest.mark.parametrize("method", ["predict", "validate", "test"])
def test_other_stages_leave_the_series_alone(method: str, tmp_path: Path) -> None:
    keep_all = ModelCheckpoint(tmp_path / "lightning", filename="{epoch}", save_top_k=-1)
    trainer = fit(TRAKCallback(tmp_path / "run"), keep_all, enable_checkpointing=True)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    module = trainer.lightning_module
    getattr(trainer, method)(module, loader(), ckpt_path=tmp_path / "lightning/epoch=0.ckpt")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before

    trainer.fit_loop.max_epochs = 4  # and training goes on where it was
    trainer.fit(module, loader())
    assert steps(tmp_path / "run") == [4, 8, 12, 16]


def test_loading_for_predict_does_not_license_a_new_run(tmp_path: Path) -> None:
    fit(TRAKCallback(tmp_path / "run")).save_checkpoint(tmp_path / "last.ckpt")
    trainer = make_trainer(TRAKCallback(tmp_path / "run"))
    trainer.predict(Net(), loader(), ckpt_path=tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="holds 3 snapshots of another run"):
        trainer.fit(Net(), loader())


def test_two_callbacks_of_one_trainer(tmp_path: Path) -> None:
    def callbacks() -> list[TRAKCallback]:
        return [
            TRAKCallback(tmp_path / "a"),
            TRAKCallback(tmp_path / "b"),
            TRAKCallback(tmp_path / "c", every_n_train_steps=5),
        ]

    assert len({callback.state_key for callback in callbacks()}) == 3
    fit(*callbacks()).save_checkpoint(tmp_path / "last.ckpt")
    assert [steps(tmp_path / name) for name in "abc"] == [[4, 8, 12], [4, 8, 12], [5, 10, 12]]
    make_trainer(*callbacks(), max_epochs=4).fit(Net(), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert [steps(tmp_path / name) for name in "abc"] == [[4, 8, 12, 16], [4, 8, 12, 16], [5, 10, 12, 15, 16]]


def test_two_callbacks_need_two_directories(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two TRAKCallbacks write to"):
        fit(TRAKCallback(tmp_path / "run"), TRAKCallback(f"{tmp_path}/./run/", every_n_train_steps=5))
    assert not (tmp_path / "run").exists()


# --- crashes ------------------------------------------------------------------------------------------------------

KILLED = """
    import os, signal, sys
    sys.path.insert(0, sys.argv[1])
    import safetensors.torch
    from lightning.pytorch.callbacks import ModelCheckpoint
    from test_callback import Net, TRAKCallback, loader, make_trainer

    save_file, calls = safetensors.torch.save_file, []
    def save_half(tensors, path, metadata):
        save_file(tensors, path, metadata)
        calls.append(path)
        if len(calls) == 3:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    safetensors.torch.save_file = save_half
    checkpoint = ModelCheckpoint(sys.argv[2] + "/lightning", filename="{epoch}")
    callback = TRAKCallback(sys.argv[2] + "/run", every_n_train_steps=2)
    make_trainer(callback, checkpoint, enable_checkpointing=True).fit(Net(), loader())
"""


def test_training_that_is_killed_in_a_save_resumes(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    command = [sys.executable, script, Path(__file__).parent, tmp_path]
    finished = subprocess.run(command, capture_output=True, check=False)
    assert finished.returncode == -signal.SIGKILL, finished.stderr.decode()
    assert [checkpoint.record.step for checkpoint in resolve_checkpoints(tmp_path / "run")] == [2, 4]

    fit(TRAKCallback(tmp_path / "whole", every_n_train_steps=2), num_sanity_val_steps=0)
    trainer = make_trainer(TRAKCallback(tmp_path / "run", every_n_train_steps=2))
    trainer.fit(Net(), loader(), ckpt_path=tmp_path / "lightning/epoch=0.ckpt")
    resumed, whole = resolve_checkpoints(tmp_path / "run"), resolve_checkpoints(tmp_path / "whole")
    assert [c.record for c in resumed] == [c.record for c in whole]
    assert [c.fingerprint() for c in resumed] == [c.fingerprint() for c in whole]


# --- several processes --------------------------------------------------------------------------------------------

DISTRIBUTED = """
    import json, os, sys
    from datetime import timedelta
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    import lightning as L, torch
    from lightning.pytorch.strategies import ModelParallelStrategy
    from lightning_trak.callback import TRAKCallback
    from lightning_trak.checkpoints import resolve_checkpoints
    from lightning_trak.snapshots import SnapshotSeries
    from test_callback import Net, loader

    class Sharded(Net):
        def __init__(self):
            super().__init__()
            self.head.weight = torch.nn.Parameter(self.head.weight.contiguous())  # as FSDP needs it
        def configure_model(self):
            from torch.distributed.fsdp import fully_shard
            fully_shard(self, mesh=self.device_mesh["data_parallel"])

    root = Path(sys.argv[2])
    rank = int(os.environ.get("LOCAL_RANK", 0))
    save = SnapshotSeries.save
    def counted(self, *args):
        (root / f"wrote-{rank}").touch()
        return save(self, *args)
    SnapshotSeries.save = counted

    def fit(module, strategy, *callbacks):
        trainer = L.Trainer(accelerator="cpu", devices=2, strategy=strategy, max_epochs=2, logger=False,
                            enable_checkpointing=False, enable_progress_bar=False, callbacks=list(callbacks))
        trainer.fit(module, loader())

    # a directory that each rank spells differently, as with a time stamp: rank zero's counts
    epochs = TRAKCallback(root / f"epochs-{rank}")
    clocks = TRAKCallback(root / "time", train_time_interval=timedelta(0 if rank == 0 else 1))
    module = Net()
    fit(module, "ddp", epochs, clocks)
    seen = {name: [c.record.step for c in resolve_checkpoints(root / name)] for name in ("epochs-0", "time")}
    torch.save(module.state_dict(), root / f"final-{rank}.pt")

    try:  # every rank must meet the refusal, not wait for the one that saw it
        fit(Net(), "ddp", TRAKCallback(root / "time"))
    except ValueError as error:
        seen["refusal"] = str(error)

    fit(Sharded(), ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1), TRAKCallback(root / "sharded"))
    (root / f"rank-{rank}.json").write_text(json.dumps(seen))
"""


def test_two_processes(tmp_path: Path) -> None:
    script = tmp_path / "distributed.py"
    script.write_text(textwrap.dedent(DISTRIBUTED))
    command = [sys.executable, script, Path(__file__).parent, tmp_path]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert finished.returncode == 0, finished.stderr

    seen = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert seen[0] == seen[1]
    assert seen[0]["epochs-0"] == [2, 4]
    assert seen[0]["time"] == [1, 2, 3, 4]
    assert "holds 4 snapshots of another run" in seen[0]["refusal"]
    assert (tmp_path / "wrote-0").exists()
    assert not (tmp_path / "wrote-1").exists()
    assert not (tmp_path / "epochs-1").exists()

    final = torch.load(tmp_path / "final-0.pt")
    saved = resolve_checkpoints(tmp_path / "epochs-0")[-1].load()
    assert all(torch.equal(saved[name], final[name]) for name in final)
    # FSDP averages gradients as DDP does, so its gathered weights are the same
    sharded = resolve_checkpoints(tmp_path / "sharded")[-1].load()
    assert sharded.keys() == final.keys()
    for name in final:
        torch.testing.assert_close(sharded[name], final[name])


# --- arguments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_epochs": 1, "every_n_train_steps": 2}, "every_n_epochs and every_n_train_steps"),
        ({"every_n_epochs": 1, "train_time_interval": timedelta(1)}, "every_n_epochs and train_time_interval"),
        ({"every_n_epochs": 0}, "expected a positive every_n_epochs, got 0"),
        ({"every_n_train_steps": -1}, "expected a positive every_n_train_steps, got -1"),
        ({"train_time_interval": timedelta(seconds=-1)}, "expected a positive train_time_interval, got -1"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        TRAKCallback(tmp_path, **options)


def test_partitioned_weights_are_refused(tmp_path: Path) -> None:
    trainer = SimpleNamespace(strategy=SimpleNamespace(zero_stage_3=True), fast_dev_run=0, callbacks=[])
    with pytest.raises(RuntimeError, match="ZeRO stage 3"):
        TRAKCallback(tmp_path).setup(trainer, Net(), "fit")


def test_the_default_checkpoints_of_lightning_are_kept(tmp_path: Path) -> None:
    trainer = fit(TRAKCallback(tmp_path / "run"), enable_checkpointing=True, default_root_dir=tmp_path, max_epochs=1)
    assert isinstance(trainer.checkpoint_callback, ModelCheckpoint)
