"""Two runs that meet in one directory: one of them ends with an error before anything is mixed."""

from __future__ import annotations

import copy
import fcntl
import json
import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lightning_trak.callbacks.snapshots import TRAKCallback
from lightning_trak.checkpoints.reading import resolve_checkpoints
from lightning_trak.checkpoints.series import SnapshotSeries
from tests.callback_nets import Net, fit, loader, make_trainer, steps
from tests.launch import start_script
from tests.snapshot_data import GROUPS, assert_equal, make_state_dict

GOING = "another run is writing to"
TAKEN = "after this one began, so the snapshot of step"


class Shared(NamedTuple):
    directory: str
    locks: bool


@pytest.fixture(params=["locks", "no locks", "memory"])
def shared(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shared:
    """A directory, on file systems that have locks and that have none."""

    def unsupported(*args: Any) -> None:
        raise OSError(38, "Function not implemented")

    if request.param == "no locks":
        monkeypatch.setattr(fcntl, "flock", unsupported)
    directory = f"memory://{tmp_path.name}/run" if request.param == "memory" else str(tmp_path / "run")
    return Shared(directory, request.param == "locks")


def save(series: SnapshotSeries, seed: int, step: int) -> None:
    series.save(make_state_dict(seed), step, step, GROUPS)


# --- two series objects -------------------------------------------------------------------------------------------


def test_an_empty_series_of_a_run_that_is_going(shared: Shared) -> None:
    first, second = SnapshotSeries(shared.directory), SnapshotSeries(shared.directory)
    run = first.open().run
    if shared.locks:
        with pytest.raises(ValueError, match=GOING):
            second.open()
        loser, winner, expected = second, first, run
    else:
        with pytest.warns(UserWarning, match="another run has begun in .* ends with an error at its first"):
            expected = second.open().run
        loser, winner = first, second
    save(winner, 1, 10)
    with pytest.raises((ValueError, FileNotFoundError)):
        save(loser, 2, 10)
    with pytest.raises((ValueError, FileNotFoundError)):
        save(loser, 2, 20)
    save(winner, 1, 20)
    assert winner.read().run == expected
    assert steps(shared.directory) == [10, 20]
    for checkpoint in resolve_checkpoints(shared.directory):
        assert_equal(checkpoint.load(), make_state_dict(1))


def test_both_resume(shared: Shared) -> None:
    series = SnapshotSeries(shared.directory)
    run = series.open().run
    save(series, 1, 10)
    series.close()

    first, second = SnapshotSeries(shared.directory), SnapshotSeries(shared.directory)
    first.open([run], 10)
    if shared.locks:
        with pytest.raises(ValueError, match=GOING):
            second.open([run], 10)
        winner, loser = first, second
    else:
        second.open([run], 10)
        winner, loser = second, first
    with pytest.raises(ValueError, match=TAKEN):
        save(loser, 3, 20)
    save(winner, 2, 20)
    with pytest.raises(ValueError, match=TAKEN):
        save(loser, 3, 30)
    assert [float(c.load()["e.count"]) for c in resolve_checkpoints(shared.directory)] == [8, 9]


def test_a_resumed_run_meets_a_new_one(shared: Shared) -> None:
    old, new = SnapshotSeries(shared.directory), SnapshotSeries(shared.directory)
    old.open(["old"], 5)  # from a checkpoint, into an empty directory
    if shared.locks:
        with pytest.raises(ValueError, match=GOING):
            new.open()
        save(old, 1, 10)
        assert old.read().run == "old"
    else:
        with pytest.warns(UserWarning, match="another run has begun"):
            run = new.open().run
        with pytest.raises(ValueError, match=TAKEN):
            save(old, 1, 10)
        save(new, 2, 10)
        assert new.read().run == run
        with pytest.raises(ValueError, match="holds 1 snapshots of another run"):
            SnapshotSeries(shared.directory).open(["old"], 5)


def test_a_writer_needs_to_begin(shared: Shared) -> None:
    series = SnapshotSeries(shared.directory)
    series.open()
    before = series.filesystem.cat_file(series.path("manifest.json"))
    with pytest.raises(ValueError, match=TAKEN):
        save(SnapshotSeries(shared.directory), 1, 10)
    series.close()
    with pytest.raises(ValueError, match=TAKEN):
        save(series, 1, 10)
    assert series.filesystem.cat_file(series.path("manifest.json")) == before


def test_a_refused_run_does_not_keep_the_directory(tmp_path: Path) -> None:
    series = SnapshotSeries(tmp_path)
    run = series.open().run
    save(series, 1, 10)
    series.close()
    refused = SnapshotSeries(tmp_path)
    with pytest.raises(ValueError, match="holds 1 snapshots of another run"):
        refused.open()
    with pytest.raises(ValueError, match="holds 1 snapshots of another run"):
        refused.open(["other"], 10)
    SnapshotSeries(tmp_path).open([run], 10)


# --- two Trainers -------------------------------------------------------------------------------------------------


class Meanwhile(Callback):
    """Runs something at a batch of another's training."""

    def __init__(self, batch: int, act: Callable[[], Any]) -> None:
        self.batch, self.act = batch, act

    def on_train_batch_start(self, *args: Any) -> None:
        if self.batch == 0:
            self.act()
        self.batch -= 1


class Other(Net):
    """Has other weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.nn.init.zeros_(self.head.weight)


@pytest.mark.parametrize("batch", [0, 2, 6])  # before and after the first snapshot
def test_a_run_that_begins_while_another_is_going(batch: int, shared: Shared) -> None:
    errors = []

    def begin() -> None:
        try:
            fit(TRAKCallback(shared.directory), module=Other())
        except ValueError as error:
            errors.append(str(error))

    first = TRAKCallback(shared.directory)
    try:
        fit(first, Meanwhile(batch, begin))
    except ValueError as error:
        errors.append(str(error))
    assert len(errors) == 1
    first_won = shared.locks or batch == 6
    assert (GOING if shared.locks else "snapshots of another run" if batch == 6 else TAKEN) in errors[0]
    assert steps(shared.directory) == [4, 8, 12]
    if first_won:
        assert SnapshotSeries(shared.directory).read().run == first._run
    fit(TRAKCallback(f"{shared.directory}-alone"), module=Net() if first_won else Other())
    assert fingerprints(shared.directory) == fingerprints(f"{shared.directory}-alone")


def test_two_resumes_of_one_run(shared: Shared, tmp_path: Path) -> None:
    fit(TRAKCallback(shared.directory), max_epochs=1).save_checkpoint(tmp_path / "last.ckpt")
    errors = []

    def resume(*callbacks: Callback) -> None:
        trainer = make_trainer(TRAKCallback(shared.directory), *callbacks, max_epochs=3)
        try:
            trainer.fit(Net(), loader(), ckpt_path=tmp_path / "last.ckpt")
        except ValueError as error:
            errors.append(str(error))

    resume(Meanwhile(6, resume))
    assert len(errors) == 1
    assert (GOING if shared.locks else TAKEN) in errors[0]
    assert steps(shared.directory) == [4, 8, 12]
    for checkpoint in resolve_checkpoints(shared.directory):
        checkpoint.load()


def fingerprints(directory: str) -> list[str]:
    return [checkpoint.fingerprint() for checkpoint in resolve_checkpoints(directory)]


def test_the_directory_is_free_after_any_end(tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    def fail() -> None:
        raise RuntimeError("failed")

    kept = []  # so that nothing is freed because an object is gone
    for act, error in ((interrupt, SystemExit), (fail, RuntimeError)):
        kept.append(TRAKCallback(tmp_path))
        with pytest.raises((error, KeyboardInterrupt)):
            fit(kept[-1], Meanwhile(2, act))
    kept.append(TRAKCallback(tmp_path))
    fit(kept[-1], max_epochs=1)
    again = copy.copy(kept[-1])
    with pytest.raises(ValueError, match="holds 1 snapshots of another run"):
        fit(again)


KILLED = """
    import signal, sys
    from pathlib import Path
    from lightning_trak.checkpoints.series import SnapshotSeries

    series = SnapshotSeries(sys.argv[1])
    Path(sys.argv[2]).write_text(series.open().run)
    signal.pause()
"""


@pytest.mark.slow
def test_other_processes(tmp_path: Path) -> None:
    """A run in another process keeps this one out until it dies, by whatever death."""
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    directory = tmp_path / "run"
    pipe = tmp_path / "run it began"
    os.mkfifo(pipe)
    process = start_script(script, directory, pipe)
    try:
        run = pipe.read_text()
        with pytest.raises(ValueError, match=GOING):
            SnapshotSeries(directory).open()
        assert SnapshotSeries(directory).read().run == run
    finally:
        process.kill()
        process.join()
    assert SnapshotSeries(directory).open().run != run
    assert json.loads((directory / "manifest.json").read_text())["snapshots"] == []
