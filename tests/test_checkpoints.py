from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import uuid
from dataclasses import asdict
from pathlib import Path

import fsspec
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from lightning_trak.checkpoints import resolve_checkpoints
from lightning_trak.snapshots import ParameterGroup, SnapshotSeries

GROUPS = [ParameterGroup(0, "AdamW", 0.1, 0.01), ParameterGroup(1, "Rprop", 1e-3, None)]


def make_state_dict(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 4, generator=generator)
    return {
        "a.weight": weight,
        "b.tied": weight,
        "c.transposed": torch.randn(5, 2, generator=generator).T,
        "d.half": torch.randn(6, generator=generator).to(torch.bfloat16),
        "e.count": torch.tensor(7 + seed),
        "f.empty": torch.zeros(0, 3),
        "g.view": weight[:2],
        "h.flat": weight.view(-1),
        "i.mask": torch.tensor([True, False]),
    }


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype, name
        assert torch.equal(first[name], second[name]), name


def fill(directory: str | Path, steps: tuple[int, ...] = (10, 20)) -> SnapshotSeries:
    series = SnapshotSeries(directory)
    series.begin()
    for step in steps:
        series.save(make_state_dict(step), step, step // 10, GROUPS)
    return series


@pytest.fixture(params=["local", "file", "memory"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    remote = f"memory://{uuid.uuid4().hex}/snapshots"
    return {"local": str(tmp_path / "run/snapshots"), "file": (tmp_path / "run").as_uri(), "memory": remote}[
        request.param
    ]


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


def test_manifest_is_plain_json(tmp_path: Path) -> None:
    fill(tmp_path, (10,))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["format"] == 1
    assert manifest["snapshots"] == [
        {
            "file": "snapshot-00000010.safetensors",
            "step": 10,
            "epoch": 1,
            "parameter_groups": [asdict(group) for group in GROUPS],
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
    series.begin()
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
        SnapshotSeries(directory).begin()
    assert SnapshotSeries(directory).read() == before


def test_begin_accepts_a_series_without_snapshots(directory: str) -> None:
    first = SnapshotSeries(directory).begin()
    assert SnapshotSeries(directory).begin() != first


def test_resume_drops_later_entries_only(directory: str) -> None:
    series = fill(directory, (10, 20, 30))
    run = series.read().run
    assert [snapshot.step for snapshot in series.resume(["other", run], 25).snapshots] == [10, 20]
    assert [snapshot.step for snapshot in series.read().snapshots] == [10, 20]
    assert series.read().run == run
    series.save(make_state_dict(31), 30, 3, GROUPS)
    assert_equal(resolve_checkpoints(directory)[2].load(), make_state_dict(31))


def test_resume_refuses_another_runs_snapshots(tmp_path: Path) -> None:
    series = fill(tmp_path)
    with pytest.raises(ValueError, match="holds 2 snapshots of another run"):
        series.resume(["unknown"], 20)
    assert len(series.read().snapshots) == 2


def test_resume_in_an_empty_directory_keeps_the_runs_name(directory: str) -> None:
    series = SnapshotSeries(directory)
    assert series.resume(["mine", "other"], 20).run == "mine"
    assert series.read().run == "mine"


def test_save_needs_a_series(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json"):
        SnapshotSeries(tmp_path).save(make_state_dict(), 1, 1, GROUPS)


@pytest.mark.parametrize(
    ("value", "kind"), [({"scale": 1}, "dict"), (torch.eye(3).to_sparse(), "a torch.sparse_coo tensor")]
)
def test_save_names_what_is_no_dense_tensor(value: object, kind: str, tmp_path: Path) -> None:
    series = fill(tmp_path)
    with pytest.raises(TypeError, match=f"'fp8._extra_state' is {kind}"):
        series.save({"weight": torch.ones(1), "fp8._extra_state": value}, 30, 3, GROUPS)
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
    from lightning_trak.snapshots import SnapshotSeries

    directory, stage = sys.argv[1:]
    series = SnapshotSeries(directory)
    run = series.begin()
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


@pytest.mark.parametrize("stage", ["tensors", "manifest.json"])
def test_a_killed_process_leaves_earlier_snapshots_and_resumes(stage: str, tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    directory = tmp_path / "snapshots"
    finished = subprocess.run([sys.executable, script, directory, stage], capture_output=True, check=False)
    assert finished.returncode == -signal.SIGKILL, finished.stderr.decode()

    assert [float(c.load()["weight"].mean()) for c in resolve_checkpoints(directory)] == [1, 2]
    assert list(directory.glob(".*.tmp"))
    series = SnapshotSeries(directory)
    series.resume([series.read().run], 2)
    assert not list(directory.glob(".snapshot-*"))
    series.save({"weight": torch.full((1000,), 3.0)}, 3, 3, [])
    assert [float(c.load()["weight"].mean()) for c in resolve_checkpoints(directory)] == [1, 2, 3]


# --- reading any kind of checkpoint -------------------------------------------------------------------------------


def write_all_kinds(state_dict: dict[str, Tensor], folder: Path) -> list[Path]:
    paths = [folder / name for name in ("lightning.ckpt", "plain.pt", "plain.pth", "plain.bin", "legacy.pt")]
    lightning = {"state_dict": state_dict, "epoch": 3, "optimizer_states": [{}], "callbacks": {"a": {"b": 1}}}
    torch.save(lightning, paths[0])
    for path in paths[1:4]:
        torch.save(state_dict, path)
    torch.save(state_dict, paths[4], _use_new_zipfile_serialization=False)
    series = SnapshotSeries(folder / "series")
    series.begin()
    return [*paths, folder / "series" / series.save(state_dict, 1, 1, []).file]


def test_all_kinds_give_the_same_weights_and_fingerprint(tmp_path: Path) -> None:
    state_dict = make_state_dict()
    paths = write_all_kinds(state_dict, tmp_path)
    remote = f"memory://{uuid.uuid4().hex}"
    fsspec.filesystem("memory").put(str(tmp_path) + "/", remote + "/", recursive=True)
    urls = [f"{remote}/{path.relative_to(tmp_path)}" for path in paths]

    checkpoints = resolve_checkpoints([state_dict, *paths, *urls, tmp_path / "series", f"{remote}/series"])
    assert len(checkpoints) == 1 + 2 * len(paths) + 2
    for checkpoint in checkpoints:
        assert_equal(checkpoint.load(), state_dict)
        assert all(tensor.device.type == "cpu" and not tensor.requires_grad for tensor in checkpoint.load().values())
    assert len({checkpoint.fingerprint() for checkpoint in checkpoints}) == 1
    assert checkpoints[1].name == "lightning.ckpt"
    assert [checkpoint.record is None for checkpoint in checkpoints] == [True] * (1 + 2 * len(paths)) + [False, False]


def test_fingerprint_is_a_sha256_of_names_dtypes_shapes_and_bytes() -> None:
    weight = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
    expected = hashlib.sha256(b'["a", "torch.int64", []]' + (5).to_bytes(8, "little"))
    expected.update(b'["b", "torch.bfloat16", [1, 2]]' + bytes([0x80, 0x3F, 0x00, 0x40]))
    found = resolve_checkpoints({"b": weight, "a": torch.tensor(5)})[0].fingerprint()
    assert found == expected.hexdigest()


@pytest.mark.parametrize(
    "other",
    [
        {"weight": torch.tensor([1.0, 3.0])},
        {"heavy": torch.tensor([1.0, 2.0])},
        {"weight": torch.tensor([[1.0, 2.0]])},
        {"weight": torch.tensor([1.0, 2.0]).view(torch.int32)},
        {"weight": torch.tensor([1.0, 2.0]), "bias": torch.zeros(0)},
    ],
)
def test_fingerprint_tells_different_weights_apart(other: dict[str, Tensor]) -> None:
    first, second = resolve_checkpoints([{"weight": torch.tensor([1.0, 2.0])}, other])
    assert first.fingerprint() != second.fingerprint()


def test_several_runs_in_one_list_keep_their_order(tmp_path: Path) -> None:
    fill(tmp_path / "first", (10, 20))
    fill(tmp_path / "second", (5,))
    checkpoints = resolve_checkpoints([tmp_path / "second", str(tmp_path / "first")])
    assert [checkpoint.name for checkpoint in checkpoints] == [
        "second/snapshot-00000005.safetensors",
        "first/snapshot-00000010.safetensors",
        "first/snapshot-00000020.safetensors",
    ]


def test_a_directory_with_a_suffix_is_a_series(tmp_path: Path) -> None:
    fill(tmp_path / "run.pt")
    assert len(resolve_checkpoints(tmp_path / "run.pt")) == 2


def test_state_dicts_in_memory_are_safe_from_later_training() -> None:
    model = nn.Linear(2, 2)
    expected = copy.deepcopy(model.state_dict())
    checkpoint = resolve_checkpoints([model.state_dict()])[0]
    nn.init.zeros_(model.weight)
    assert_equal(checkpoint.load(), dict(expected))


def test_live_state_dicts_of_one_model_are_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="checkpoints 0 and 2 are the same tensors in memory"):
        resolve_checkpoints([model.state_dict(), copy.deepcopy(model.state_dict()), model.state_dict()])


def test_state_dicts_may_share_a_frozen_part() -> None:
    frozen = torch.ones(2)
    assert len(resolve_checkpoints([{"w": torch.ones(1), "f": frozen}, {"w": torch.ones(1), "f": frozen}])) == 2


def test_names_of_compiled_modules_are_kept() -> None:
    assert set(resolve_checkpoints({"net._orig_mod.weight": torch.ones(1)})[0].load()) == {"net._orig_mod.weight"}


def test_tensors_stay_readable_while_the_file_is_replaced(tmp_path: Path) -> None:
    series = fill(tmp_path, (10,))
    loaded = resolve_checkpoints(tmp_path)[0].load()
    series.save(make_state_dict(99), 10, 1, GROUPS)
    assert_equal(loaded, make_state_dict(10))


# --- pickled code -------------------------------------------------------------------------------------------------


class Innocent:
    def __reduce__(self) -> tuple[object, ...]:
        return (setattr, (Innocent, "ran", True))


def test_code_in_a_file_runs_only_on_the_users_word(tmp_path: Path) -> None:
    Innocent.ran = False
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"weight": torch.ones(2)}, "hyper_parameters": Innocent()}, path)
    checkpoint = resolve_checkpoints(path)[0]
    with pytest.raises(ValueError, match=r"it needs .*setattr.*weights_only=False.*from a source you trust"):
        checkpoint.load()
    assert not Innocent.ran
    assert_equal(resolve_checkpoints(path, weights_only=False)[0].load(), {"weight": torch.ones(2)})
    assert Innocent.ran


class Blocked:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, ("never",))


def test_functions_that_torch_blocks_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"weight": torch.ones(2)}, "hyper_parameters": Blocked()}, "model.ckpt")
    with pytest.raises(ValueError, match=r"it needs \w+\.mkdir\. weights_only=False"):
        resolve_checkpoints("model.ckpt")[0].load()
    assert not Path("never").exists()


@pytest.mark.parametrize("remote", [False, True])
def test_the_class_that_a_file_needs_is_named(remote: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"w": torch.ones(2)}, "hyper_parameters": argparse.Namespace(lr=1)}, path)
    location = str(path)
    if remote:
        location = f"memory://{uuid.uuid4().hex}/model.ckpt"
        fsspec.filesystem("memory").pipe_file(location, path.read_bytes())
    with pytest.raises(ValueError, match=r"model\.ckpt.* it needs argparse\.Namespace"):
        resolve_checkpoints(location)[0].load()
    assert_equal(resolve_checkpoints(location, weights_only=False)[0].load(), {"w": torch.ones(2)})


# --- errors -------------------------------------------------------------------------------------------------------


def test_empty_list() -> None:
    with pytest.raises(ValueError, match="empty list"):
        resolve_checkpoints([])


@pytest.mark.parametrize("item", [3, None, nn.Linear(1, 1), [{"w": torch.ones(1)}]])
def test_wrong_item(item: object) -> None:
    with pytest.raises(TypeError, match=rf"as checkpoint 1, got {type(item).__name__}"):
        resolve_checkpoints([{"w": torch.ones(1)}, item])


def test_wrong_state_dicts() -> None:
    with pytest.raises(TypeError, match="'epoch' is int"):
        resolve_checkpoints({"weight": torch.ones(1), "epoch": 3})
    with pytest.raises(TypeError, match="state dict 0, but 0 is not a name"):
        resolve_checkpoints({0: torch.ones(1)})
    with pytest.raises(ValueError, match="state dict 1 is empty"):
        resolve_checkpoints([{"w": torch.ones(1)}, {}])


def test_file_without_a_state_dict(tmp_path: Path) -> None:
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    with pytest.raises(TypeError, match=r'expected a state dict in ".*list\.pt", got list'):
        resolve_checkpoints(tmp_path / "list.pt")[0].load()
    torch.save(nn.Linear(1, 1), tmp_path / "module.pt")
    with pytest.raises(TypeError, match=r"module\.pt.*, got Linear"):
        resolve_checkpoints(tmp_path / "module.pt", weights_only=False)[0].load()
    safetensors.torch.save_file({}, tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match=r'none\.safetensors" is empty'):
        resolve_checkpoints(tmp_path / "none.safetensors")[0].load()


@pytest.mark.parametrize("name", ["absent.ckpt", "absent.safetensors"])
def test_absent_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{name}.*does not exist"):
        resolve_checkpoints(tmp_path / name)


def test_file_that_goes_away(tmp_path: Path) -> None:
    paths = write_all_kinds(make_state_dict(), tmp_path)
    for path, checkpoint in zip(paths, resolve_checkpoints(list(paths)), strict=True):
        path.unlink()
        with pytest.raises(FileNotFoundError, match=path.name):
            checkpoint.load()


def test_directory_without_manifest(directory: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json in .* TRAKCallback"):
        resolve_checkpoints(directory)


def test_file_in_place_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("weights?")
    with pytest.raises(FileNotFoundError, match=r'no manifest\.json in ".*notes\.txt"'):
        resolve_checkpoints(tmp_path / "notes.txt")


def test_series_without_snapshots(directory: str) -> None:
    SnapshotSeries(directory).begin()
    with pytest.raises(ValueError, match="holds no snapshots yet"):
        resolve_checkpoints(directory)


def test_snapshot_that_is_gone(directory: str) -> None:
    series = fill(directory, (10, 20, 30))
    series.filesystem.rm_file(series.path("snapshot-00000020.safetensors"))
    with pytest.raises(FileNotFoundError, match=r'lacks 1 of the 3 snapshots .* "snapshot-00000020\.safetensors"'):
        resolve_checkpoints(directory)


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_truncated_snapshot(keep: int, directory: str) -> None:
    series = fill(directory)
    path = series.path("snapshot-00000020.safetensors")
    series.filesystem.pipe_file(path, series.filesystem.cat_file(path)[:keep])
    first, second = resolve_checkpoints(directory)
    assert_equal(first.load(), make_state_dict(10))
    with pytest.raises(ValueError, match=r"snapshot-00000020\.safetensors.* is truncated or not a safetensors file"):
        second.load()


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("content", [b"", b"hello world", b"\x80\x02hello", None])
def test_damaged_torch_file(content: bytes | None, weights_only: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": make_state_dict()}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(ValueError, match=r"model\.ckpt.* is truncated or not a file of torch\.save"):
        resolve_checkpoints(path, weights_only)[0].load()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not the manifest"),
        ("[]", "not the manifest"),
        ('{"format": 1, "num_examples": 3}', "not the manifest.*'run'"),
        ('{"format": 2, "run": "a", "snapshots": []}', "it has format 2, and this version reads 1"),
        ('{"format": 1, "run": "a", "snapshots": [{"file": "x"}]}', "not the manifest"),
    ],
)
def test_damaged_manifest(content: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=reason):
        resolve_checkpoints(tmp_path)
    with pytest.raises(ValueError, match=reason):
        SnapshotSeries(tmp_path).begin()
    assert (tmp_path / "manifest.json").read_text() == content
