"""The series of snapshots on disk, also after a crash."""

from __future__ import annotations

import json
import os
import re
import signal
import textwrap
from dataclasses import asdict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from lightning_trak.checkpoints.reading import resolve_checkpoints
from lightning_trak.checkpoints.series import SnapshotSeries
from lightning_trak.storage.files import tensor_digest
from tests.launch import run_script
from tests.snapshot_data import GROUPS, assert_equal, fill, make_state_dict

# --- the series ---------------------------------------------------------------------------------------------------


def test_series_gives_back_what_was_saved(directory: str) -> None:
    fill(directory)
    checkpoints = resolve_checkpoints(directory)
    assert [checkpoint.record.step for checkpoint in checkpoints] == [10, 20]
    assert [checkpoint.record.epoch for checkpoint in checkpoints] == [1, 2]
    assert [checkpoint.record.parameter_groups for checkpoint in checkpoints] == [tuple(GROUPS)] * 2
    assert checkpoints[0].name == f"{Path(directory).name}/snapshot-00000010.safetensors"
    for checkpoint in checkpoints:
        assert_equal(checkpoint.load(), make_state_dict(checkpoint.record.step))


def test_what_the_optimizer_multiplies_by_is_kept_for_those_that_asked(directory: str) -> None:
    series, factors = fill(directory, (10,)), {"a.weight": torch.rand(3, 4)}
    series.save(make_state_dict(20), 20, 2, GROUPS, factors)
    without, kept = resolve_checkpoints(directory)
    assert_equal(kept.load_preconditioner(), factors)
    assert_equal(kept.load(), make_state_dict(20))
    with pytest.raises(ValueError, match=r"snapshot-00000010\.safetensors comes without the preconditioner"):
        without.load_preconditioner()
    series.filesystem.rm_file(series.path("preconditioner-00000020.safetensors"))
    with pytest.raises(FileNotFoundError, match=r'lacks 1 of the 3 files .* "preconditioner-00000020\.safetensors"'):
        resolve_checkpoints(directory)


def test_manifest_is_plain_json(tmp_path: Path) -> None:
    fill(tmp_path, (10,))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["format"] == 3
    file = tmp_path / "snapshot-00000010.safetensors"
    assert manifest["snapshots"] == [
        {
            "file": file.name,
            "size": file.stat().st_size,
            "sha256": tensor_digest(make_state_dict(10)),
            "step": 10,
            "epoch": 1,
            "parameter_groups": [asdict(group) | {"parameters": list(group.parameters)} for group in GROUPS],
        }
    ]


def test_tied_tensors_are_stored_once_and_tied_again(directory: str) -> None:
    series = fill(directory, (10,))
    content = series.filesystem.cat_file(series.path("snapshot-00000010.safetensors"))
    stored = safetensors.torch.load(content)
    assert ("a.weight" in stored) != ("b.tied" in stored)
    assert {"c.transposed", "g.view", "h.flat"} <= stored.keys()
    loaded = resolve_checkpoints(directory)[0].load()
    assert loaded["a.weight"].data_ptr() == loaded["b.tied"].data_ptr()


def test_ties_follow_the_convention_of_safetensors(tmp_path: Path) -> None:
    model = nn.ModuleDict({"embed": nn.Linear(3, 4), "head": nn.Linear(3, 4)})
    model["head"].weight = model["embed"].weight
    safetensors.torch.save_model(model, str(tmp_path / "theirs.safetensors"))
    assert_equal(resolve_checkpoints(tmp_path / "theirs.safetensors")[0].load(), dict(model.state_dict()))

    series = SnapshotSeries(tmp_path / "ours")
    series.open()
    snapshot = series.save(model.state_dict(), 1, 1, [])
    clone = nn.ModuleDict({"embed": nn.Linear(3, 4), "head": nn.Linear(3, 4)})
    clone["head"].weight = clone["embed"].weight
    safetensors.torch.load_model(clone, series.path(snapshot.file))
    assert_equal(dict(clone.state_dict()), dict(model.state_dict()))


def test_saving_a_step_again_replaces_its_entry(directory: str) -> None:
    series = fill(directory, (10, 20))
    series.save(make_state_dict(99), 10, 1, GROUPS)
    checkpoints = resolve_checkpoints(directory)
    assert [checkpoint.record.step for checkpoint in checkpoints] == [10, 20]
    assert_equal(checkpoints[0].load(), make_state_dict(99))


def test_begin_refuses_another_runs_snapshots(directory: str) -> None:
    fill(directory)
    before = SnapshotSeries(directory).read()
    with pytest.raises(ValueError, match=re.escape(f'"{directory}" holds 2 snapshots of another run, up to step 20')):
        SnapshotSeries(directory).open()
    assert SnapshotSeries(directory).read() == before


def test_begin_accepts_a_series_without_snapshots(directory: str) -> None:
    first = SnapshotSeries(directory).open().run
    assert SnapshotSeries(directory).open().run != first


def test_resume_drops_later_entries_only(directory: str) -> None:
    series = fill(directory, (10, 20, 30))
    run = series.read().run
    assert [snapshot.step for snapshot in series.open(["other", run], 25).snapshots] == [10, 20]
    assert [snapshot.step for snapshot in series.read().snapshots] == [10, 20]
    assert series.read().run == run
    series.save(make_state_dict(31), 30, 3, GROUPS)
    assert_equal(resolve_checkpoints(directory)[2].load(), make_state_dict(31))


def test_resume_refuses_another_runs_snapshots(tmp_path: Path) -> None:
    series = fill(tmp_path)
    with pytest.raises(ValueError, match="holds 2 snapshots of another run"):
        series.open(["unknown"], 20)
    assert len(series.read().snapshots) == 2


def test_resume_in_an_empty_directory_keeps_the_runs_name(directory: str) -> None:
    series = SnapshotSeries(directory)
    assert series.open(["mine", "other"], 20).run == "mine"
    assert series.read().run == "mine"


def test_save_needs_a_series(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json"):
        SnapshotSeries(tmp_path).save(make_state_dict(), 1, 1, GROUPS)


@pytest.mark.parametrize(
    ("value", "kind"), [({"scale": 1}, "dict"), (torch.eye(3).to_sparse(), "a torch.sparse_coo tensor")]
)
def test_save_names_what_is_no_dense_tensor(value: object, kind: str, tmp_path: Path) -> None:
    series = fill(tmp_path)
    with pytest.raises(TypeError, match=f"'fp8.scale' is {kind}"):
        series.save({"weight": torch.ones(1), "fp8.scale": value}, 30, 3, GROUPS)
    assert len(resolve_checkpoints(tmp_path)) == 2


def test_directories_spelt_differently_have_one_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spellings = ["run", "./run/", f"{tmp_path}/x/.././run", tmp_path / "run", (tmp_path / "run").as_uri()]
    assert len({SnapshotSeries(spelling).url for spelling in spellings}) == 1
    assert SnapshotSeries("memory://run").url == SnapshotSeries("memory://run/").url


# --- crashes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crash_at", ["tensors", "first rename", "second rename"])
def test_a_crash_leaves_earlier_snapshots_and_a_later_save_works(
    crash_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    series = fill(tmp_path)
    save_file, replace = safetensors.torch.save_file, os.replace
    renames = 0

    def half_a_file(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        save_file(tensors, path, metadata)
        os.truncate(path, path.stat().st_size // 2)
        raise OSError("No space left on device")

    def failing_replace(source: Path, target: Path) -> None:
        nonlocal renames
        renames += 1
        if renames == {"first rename": 1, "second rename": 2}[crash_at]:
            raise OSError("No space left on device")
        replace(source, target)

    with monkeypatch.context() as patched:
        if crash_at == "tensors":
            patched.setattr(safetensors.torch, "save_file", half_a_file)
        else:
            patched.setattr(os, "replace", failing_replace)
        with pytest.raises(OSError, match="No space left"):
            series.save(make_state_dict(30), 30, 3, GROUPS)

    def check(steps: list[int]) -> None:
        checkpoints = resolve_checkpoints(tmp_path)
        assert [checkpoint.record.step for checkpoint in checkpoints] == steps
        for checkpoint, step in zip(checkpoints, steps, strict=True):
            assert_equal(checkpoint.load(), make_state_dict(step))

    check([10, 20])
    series.save(make_state_dict(30), 30, 3, GROUPS)
    check([10, 20, 30])


KILLED = """
    import os, signal, sys
    import safetensors.torch, torch
    from lightning_trak.checkpoints.series import SnapshotSeries

    directory, stage = sys.argv[1:]
    series = SnapshotSeries(directory)
    run = series.open().run
    for step in (1, 2):
        series.save({"weight": torch.full((1000,), float(step))}, step, step, [])

    save_file, replace = safetensors.torch.save_file, os.replace
    def die(): os.kill(os.getpid(), signal.SIGKILL)
    def save_half(tensors, path, metadata):
        save_file(tensors, path, metadata)
        os.truncate(path, 1000)
        die()
    def die_on(name):
        def rename(source, target):
            if os.path.basename(target) == name:
                die()
            replace(source, target)
        return rename
    if stage == "tensors":
        safetensors.torch.save_file = save_half
    else:
        os.replace = die_on(stage)
    series.save({"weight": torch.full((1000,), 3.0)}, 3, 3, [])
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["tensors", "manifest.json"])
def test_a_killed_process_leaves_earlier_snapshots_and_resumes(stage: str, tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    directory = tmp_path / "snapshots"
    assert run_script(script, directory, stage) == -signal.SIGKILL, script.with_suffix(".log").read_text()

    assert [float(c.load()["weight"].mean()) for c in resolve_checkpoints(directory)] == [1, 2]
    assert list(directory.glob(".*.tmp"))
    series = SnapshotSeries(directory)
    series.open([series.read().run], 2)
    assert not list(directory.glob(".snapshot-*"))
    series.save({"weight": torch.full((1000,), 3.0)}, 3, 3, [])
    assert [float(c.load()["weight"].mean()) for c in resolve_checkpoints(directory)] == [1, 2, 3]
