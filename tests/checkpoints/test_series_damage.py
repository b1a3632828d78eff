"""Files of a series that are not what was written."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from lightning_trak.checkpoints.reading import resolve_checkpoints
from lightning_trak.checkpoints.series import SnapshotSeries
from lightning_trak.storage.schemas import with_checksum
from tests.snapshot_data import GROUPS, assert_equal, fill, make_state_dict

FILE = "snapshot-00000020.safetensors"
MANIFEST = "manifest.json"


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Sets a field, given as "snapshots/1/step"; ``...`` deletes it."""

    def apply(manifest: Any) -> None:
        *parents, last = [int(key) if key.isdigit() else key for key in path.split("/")]
        for key in parents:
            manifest = manifest[key]
        if value is ...:
            del manifest[last]
        else:
            manifest[last] = value

    return apply


def rename(path: str, name: str) -> Callable[[dict[str, Any]], None]:
    def apply(manifest: Any) -> None:
        *parents, last = path.split("/")
        for key in parents:
            manifest = manifest[int(key) if key.isdigit() else key]
        manifest[name] = manifest.pop(last)

    return apply


def duplicate(manifest: dict[str, Any]) -> None:
    manifest["snapshots"].append(manifest["snapshots"][1])


def swap(manifest: dict[str, Any]) -> None:
    manifest["snapshots"].reverse()


def wrong_values(path: str, *values: Any) -> list[Any]:
    return [pytest.param(change(path, value), path.rpartition("/")[2], id=f"{path}={value!r:.20}") for value in values]


COUNTS = (None, -1, 1.5, "1", True, [], {}, 1 << 63, 10**300)
TEXTS = (None, 3, "", [], {})
GROUP = "snapshots/1/parameter_groups/0"
MUTATIONS = [
    *(pytest.param(change(field, ...), field, id=f"no {field}") for field in ("format", "run", "writer", "snapshots")),
    *(
        pytest.param(change(f"snapshots/0/{field}", ...), field, id=f"no {field}")
        for field in ("file", "size", "sha256", "step", "epoch", "parameter_groups")
    ),
    *(
        pytest.param(change(f"{GROUP}/{field}", ...), field, id=f"no {field}")
        for field in ("optimizer", "algorithm", "lr", "weight_decay", "parameters")
    ),
    pytest.param(rename("snapshots", "Snapshots"), "snapshots", id="renamed snapshots"),
    pytest.param(rename("snapshots/0/step", "steps"), "step", id="renamed step"),
    pytest.param(rename(f"{GROUP}/lr", "learning_rate"), "lr", id="renamed lr"),
    pytest.param(change("note", 1), "note", id="another field"),
    pytest.param(change("snapshots/0/note", 1), "note", id="another field of a snapshot"),
    pytest.param(change(f"{GROUP}/note", 1), "note", id="another field of a group"),
    *wrong_values("format", None, "3", 2, 4, 3.0, -3, True),
    *wrong_values("run", *TEXTS, "two words"),
    *wrong_values("writer", *TEXTS),
    *wrong_values("snapshots", None, 1, "x", {}, [[]], [None]),
    *wrong_values("snapshots/1/step", *COUNTS, 10, 9),
    *wrong_values("snapshots/1/epoch", *COUNTS),
    *wrong_values("snapshots/1/size", *COUNTS),
    *wrong_values("snapshots/1/sha256", *TEXTS, "0" * 63, "G" * 64, "A" * 64),
    *wrong_values(
        "snapshots/1/file",
        *TEXTS,
        f"../{FILE}",
        f"/etc/{FILE}",
        f"./{FILE}",
        f"a/{FILE}",
        f"a\\{FILE}",
        "..",
        "snapshot-00000010.safetensors",
        f"{FILE}\n",
        "s3://bucket/x.safetensors",
    ),
    *wrong_values("snapshots/1/parameter_groups", None, {}, "x", [1], [None]),
    *wrong_values(f"{GROUP}/optimizer", *COUNTS),
    *wrong_values(f"{GROUP}/algorithm", *TEXTS),
    *wrong_values(f"{GROUP}/lr", "0.1", True, [], {}, 10**400),
    *wrong_values(f"{GROUP}/weight_decay", "0.1", True, [], {}),
    *wrong_values(f"{GROUP}/parameters", None, "abc", {}, [1], [None]),
    *wrong_values("snapshots/1/preconditioner", None, [], {}, {"file": "../x", "size": 1, "sha256": "0" * 64}),
    pytest.param(duplicate, r"snapshots\[2\]\.step", id="duplicate"),
    pytest.param(swap, r"snapshots\[1\]\.step", id="swapped"),
]


@pytest.mark.parametrize(("mutate", "field"), MUTATIONS)
def test_a_wrong_field_is_named(mutate: Callable[[dict[str, Any]], None], field: str, tmp_path: Path) -> None:
    fill(tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    del manifest["checksum"]
    mutate(manifest)
    content = json.dumps(with_checksum(manifest))
    (tmp_path / MANIFEST).write_text(content)
    for use in (resolve_checkpoints, lambda path: SnapshotSeries(path).open()):
        with pytest.raises(ValueError, match=rf'(?s)"{tmp_path}/{MANIFEST}" is not the manifest.*{field}'):
            use(tmp_path)
    assert (tmp_path / MANIFEST).read_text() == content  # nothing is lost


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda content: b"", "Expecting value"),
        (lambda content: content[: len(content) // 2], "delimiter"),
        (lambda content: b"[" + content + b"]", "must be an object"),
        (lambda content: b"null", "must be an object"),
        (lambda content: b"[" * 100_000, "nested too deeply"),
        (lambda content: content.replace(b'"AdamW"', b'"\xff"', 1), "utf-8"),
        (lambda content: content.replace(b"0.01", b"NaN", 1), "NaN"),
        (lambda content: content.replace(b"0.01", b"-Infinity", 1), "Infinity"),
        (lambda content: content.replace(b"0.01", b"1e999", 1), "1e999"),
        (lambda content: content.replace(b'"lr"', b'"lr": 1, "lr"', 1), "'lr' twice"),
        (
            lambda content: content.replace(b'"step": 10', b'"step": 1' + b"0" * 5000, 1),
            "4300 digits|must be a whole number",
        ),
        (lambda content: content.replace(b"0.01", b"0.02", 1), "checksum does not match"),  # fits the schema
        (lambda content: content.replace(b'"epoch": 2', b'"epoch": 1', 1), "checksum does not match"),
    ],
)
def test_a_manifest_that_is_no_json_or_was_edited(edit: Callable[[bytes], bytes], reason: str, tmp_path: Path) -> None:
    fill(tmp_path)
    path = tmp_path / MANIFEST
    before = path.read_bytes()
    path.write_bytes(edit(before))
    assert path.read_bytes() != before
    with pytest.raises(ValueError, match=rf'(?s)"{path}" is not the manifest.*({reason})'):
        resolve_checkpoints(tmp_path)


def test_any_other_bit_of_any_file_is_noticed(directory: str) -> None:
    series = fill(directory)
    draw = random.Random(0)
    for name in (MANIFEST, FILE):
        content = series.filesystem.cat_file(series.path(name))
        for _ in range(60):
            changed = bytearray(content)
            changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
            series.filesystem.pipe_file(series.path(name), bytes(changed))
            error, found = None, []
            try:
                found = [checkpoint.load() for checkpoint in resolve_checkpoints(directory)]
            except ValueError as raised:
                error = str(raised)
            if error is None:  # such as white space, or the padding of a header
                assert_equal(found[0], make_state_dict(10))
                assert_equal(found[1], make_state_dict(20))
            else:
                assert name in error
        series.filesystem.pipe_file(series.path(name), content)


def test_a_flipped_bit_in_the_weights_is_named(directory: str) -> None:
    series = fill(directory)
    content = bytearray(series.filesystem.cat_file(series.path(FILE)))
    content[-20] ^= 64
    series.filesystem.pipe_file(series.path(FILE), bytes(content))
    first, second = resolve_checkpoints([directory])
    assert_equal(first.load(), make_state_dict(10))
    (alone,) = resolve_checkpoints(f"{directory}/{FILE}")  # the file has a checksum, too
    for damaged in (second, alone):
        with pytest.raises(ValueError, match=f'{FILE}" was altered.*checksum.*restore it from a copy'):
            damaged.load()
        with pytest.raises(ValueError, match="checksum"):
            damaged.fingerprint()


def test_swapped_files_are_named(tmp_path: Path) -> None:
    fill(tmp_path)
    os.rename(tmp_path / FILE, tmp_path / "x")
    os.rename(tmp_path / "snapshot-00000010.safetensors", tmp_path / FILE)
    os.rename(tmp_path / "x", tmp_path / "snapshot-00000010.safetensors")
    for checkpoint in resolve_checkpoints(tmp_path):
        with pytest.raises(ValueError, match=rf"{checkpoint.record.file}\" was altered or replaced"):
            checkpoint.load()


def test_the_file_of_another_series_is_named(tmp_path: Path) -> None:
    fill(tmp_path / "a")
    series = SnapshotSeries(tmp_path / "b")
    series.open()
    series.save({"w": make_state_dict()["a.weight"]}, 20, 2, GROUPS)
    shutil.copy(tmp_path / "b" / FILE, tmp_path / "a" / FILE)
    with pytest.raises(ValueError, match=rf"{FILE}\" is truncated or was replaced: .* bytes"):
        resolve_checkpoints(tmp_path / "a")[1].load()


def test_a_tied_name_that_leads_elsewhere_is_noticed(tmp_path: Path) -> None:
    """The header says which names share a tensor; it is under the checksum as the tensors are."""
    series = SnapshotSeries(tmp_path)
    series.open()
    weight = make_state_dict()["a.weight"]
    series.save({"a": weight, "b": weight, "c": weight + 1}, 1, 1, [])
    path = tmp_path / "snapshot-00000001.safetensors"
    content = path.read_bytes()
    assert content.count(b'"b":"a"') == 1
    path.write_bytes(content.replace(b'"b":"a"', b'"b":"c"'))
    with pytest.raises(ValueError, match="checksum"):
        resolve_checkpoints(path)[0].load()


def test_files_of_others_have_no_checksum(tmp_path: Path) -> None:
    safetensors.torch.save_file({"w": make_state_dict()["a.weight"]}, tmp_path / "w.safetensors", {"format": "pt"})
    assert_equal(resolve_checkpoints(tmp_path / "w.safetensors")[0].load(), {"w": make_state_dict()["a.weight"]})


@pytest.mark.parametrize("name", [MANIFEST, FILE])
@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_not_called_damaged(name: str, tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / name).chmod(0)
    with pytest.raises(PermissionError, match=name):
        [checkpoint.load() for checkpoint in resolve_checkpoints(tmp_path)]
