"""Which run a directory of snapshots belongs to, also after a crash."""

from __future__ import annotations

import signal
import textwrap
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lightning_trak.callbacks.snapshots import TRAKCallback
from lightning_trak.checkpoints.reading import resolve_checkpoints
from lightning_trak.checkpoints.series import SnapshotSeries
from tests.callback_nets import Net, fit, loader, make_trainer, steps
from tests.launch import run_script

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


def test_fit_again_of_another_module_is_another_run(tmp_path: Path) -> None:
    trainer = fit(TRAKCallback(tmp_path))
    trainer.fit_loop.max_epochs = 5
    other = Net()
    for _ in range(2):  # the refused one does not become the module of this run
        with pytest.raises(ValueError, match="holds 3 snapshots of another run, up to step 12"):
            trainer.fit(other, loader())
    assert steps(tmp_path) == [4, 8, 12]


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
    import safetensors.torch
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning_trak import TRAKCallback
    from tests.callback_nets import Net, loader, make_trainer

    save_file, calls = safetensors.torch.save_file, []
    def save_half(tensors, path, metadata):
        save_file(tensors, path, metadata)
        calls.append(path)
        if len(calls) == 3:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    safetensors.torch.save_file = save_half
    checkpoint = ModelCheckpoint(sys.argv[1] + "/lightning", filename="{epoch}")
    callback = TRAKCallback(sys.argv[1] + "/run", every_n_train_steps=2)
    make_trainer(callback, checkpoint, enable_checkpointing=True).fit(Net(), loader())
"""


@pytest.mark.slow
def test_training_that_is_killed_in_a_save_resumes(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    assert run_script(script, tmp_path) == -signal.SIGKILL, script.with_suffix(".log").read_text()
    assert [checkpoint.record.step for checkpoint in resolve_checkpoints(tmp_path / "run")] == [2, 4]

    fit(TRAKCallback(tmp_path / "whole", every_n_train_steps=2), num_sanity_val_steps=0)
    trainer = make_trainer(TRAKCallback(tmp_path / "run", every_n_train_steps=2))
    trainer.fit(Net(), loader(), ckpt_path=tmp_path / "lightning/epoch=0.ckpt")
    resumed, whole = resolve_checkpoints(tmp_path / "run"), resolve_checkpoints(tmp_path / "whole")
    assert [c.record for c in resumed] == [c.record for c in whole]
    assert [c.fingerprint() for c in resumed] == [c.fingerprint() for c in whole]
