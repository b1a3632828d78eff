"""Reading any kind of checkpoint."""

from __future__ import annotations

import argparse
import copy
import hashlib
import os
import uuid
from pathlib import Path

import fsspec
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from lightning_trak.checkpoints import Checkpoint, CheckpointFormat
from lightning_trak.checkpoints.reading import resolve_checkpoints
from lightning_trak.checkpoints.series import SnapshotSeries
from tests.snapshot_data import GROUPS, assert_equal, fill, make_state_dict

# --- reading any kind of checkpoint -------------------------------------------------------------------------------


def write_all_kinds(state_dict: dict[str, Tensor], folder: Path) -> list[Path]:
    paths = [folder / name for name in ("lightning.ckpt", "plain.pt", "plain.pth", "plain.bin", "legacy.pt")]
    lightning = {"state_dict": state_dict, "epoch": 3, "optimizer_states": [{}], "callbacks": {"a": {"b": 1}}}
    torch.save(lightning, paths[0])
    for path in paths[1:4]:
        torch.save(state_dict, path)
    torch.save(state_dict, paths[4], _use_new_zipfile_serialization=False)
    series = SnapshotSeries(folder / "series")
    series.open()
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
    with pytest.raises(TypeError, match=rf"checkpoint 1 must be .*, got {type(item).__name__}"):
        resolve_checkpoints([{"w": torch.ones(1)}, item])


def test_a_model_is_no_state_dict() -> None:
    with pytest.raises(TypeError, match=r"checkpoint 0 must be .*, got Linear; pass its state_dict\(\)"):
        resolve_checkpoints(nn.Linear(1, 1))


def test_wrong_state_dicts() -> None:
    with pytest.raises(TypeError, match="'epoch' is int"):
        resolve_checkpoints({"weight": torch.ones(1), "epoch": 3})
    with pytest.raises(TypeError, match=r"state dict 0 must .*, but 0 is not a name"):
        resolve_checkpoints({0: torch.ones(1)})
    with pytest.raises(ValueError, match="state dict 1 is empty"):
        resolve_checkpoints([{"w": torch.ones(1)}, {}])


def test_file_without_a_state_dict(tmp_path: Path) -> None:
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    with pytest.raises(TypeError, match=r'list\.pt" must hold a state dict, got list'):
        resolve_checkpoints(tmp_path / "list.pt")[0].load()
    torch.save(nn.Linear(1, 1), tmp_path / "module.pt")
    with pytest.raises(TypeError, match=r"module\.pt.*, got Linear; save its state_dict\(\)"):
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
    with pytest.raises(FileNotFoundError, match=r"it does not exist; .* pass checkpoint files as a list"):
        resolve_checkpoints(directory)


def test_file_in_place_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("weights?")
    with pytest.raises(ValueError, match=r"notes\.txt\" is a file of no known kind: .* \.safetensors, .*rename it"):
        resolve_checkpoints(tmp_path / "notes.txt")


def test_series_without_snapshots(directory: str) -> None:
    SnapshotSeries(directory).open()
    with pytest.raises(ValueError, match="holds no snapshots yet"):
        resolve_checkpoints(directory)


def test_snapshot_that_is_gone(directory: str) -> None:
    series = fill(directory, (10, 20, 30))
    series.filesystem.rm_file(series.path("snapshot-00000020.safetensors"))
    with pytest.raises(FileNotFoundError, match=r'lacks 1 of the 3 files .* "snapshot-00000020\.safetensors"'):
        resolve_checkpoints(directory)


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_truncated_snapshot(keep: int, directory: str) -> None:
    series = fill(directory)
    path = series.path("snapshot-00000020.safetensors")
    series.filesystem.pipe_file(path, series.filesystem.cat_file(path)[:keep])
    first, second = resolve_checkpoints(directory)
    assert_equal(first.load(), make_state_dict(10))
    with pytest.raises(ValueError, match=r"snapshot-00000020\.safetensors\" is truncated.* its manifest says \d+"):
        second.load()


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("content", [b"", b"hello world", b"\x80\x02hello", None])
def test_damaged_torch_file(content: bytes | None, weights_only: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": make_state_dict()}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(ValueError, match=r"model\.ckpt.* is truncated, or was not written by torch\.save"):
        resolve_checkpoints(path, weights_only)[0].load()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not the manifest"),
        ("[]", "not the manifest"),
        ('{"format": 3, "num_examples": 3}', "not the manifest.*'run'"),
        ('{"format": 2, "run": "a", "snapshots": []}', "it has format 2, but this version reads format 3"),
    ],
)
def test_damaged_manifest(content: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=reason):
        resolve_checkpoints(tmp_path)
    with pytest.raises(ValueError, match=reason):
        SnapshotSeries(tmp_path).open()
    assert (tmp_path / "manifest.json").read_text() == content


def test_a_format_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr(CheckpointFormat, "formats", list(CheckpointFormat.formats))

    class NumpyFile(CheckpointFormat):
        @classmethod
        def recognizes(cls, location):
            return location.endswith(".npz")

        @classmethod
        def find(cls, location, weights_only):
            def read():
                return {name: torch.from_numpy(array) for name, array in np.load(location).items()}

            return [Checkpoint(Path(location).name, read)]

    np.savez(tmp_path / "weights.npz", weight=np.eye(2))
    (found,) = resolve_checkpoints(tmp_path / "weights.npz")
    assert found.name == "weights.npz"
    assert torch.equal(found.load()["weight"], torch.eye(2, dtype=torch.float64))


def test_a_flipped_bit_in_a_torch_file_is_found(tmp_path: Path) -> None:
    """`torch.load` does not compare the weights with the checksums in the file."""
    path = tmp_path / "model.pt"
    torch.save({"weight": torch.arange(1000.0)}, path)
    content = bytearray(path.read_bytes())
    middle = content.index(torch.tensor(500.0).numpy().tobytes())
    content[middle] ^= 1
    path.write_bytes(content)
    assert torch.load(path)["weight"][500] != 500
    (checkpoint,) = resolve_checkpoints(path)
    with pytest.raises(ValueError, match=r"model.pt\" was altered: .*checksums \(model/data/0\); restore it"):
        checkpoint.load()


def test_a_torch_file_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weight": torch.arange(3.0)}, tmp_path / "model.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    (checkpoint,) = resolve_checkpoints(tmp_path / "model.pt")
    assert checkpoint.load()["weight"].tolist() == [0, 1, 2]
