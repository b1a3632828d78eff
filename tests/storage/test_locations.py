"""Paths and URLs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations

from lightning_trak import GradientDot
from lightning_trak.callbacks.snapshots import TRAKCallback
from lightning_trak.checkpoints.reading import resolve_checkpoints
from lightning_trak.checkpoints.series import SnapshotSeries
from lightning_trak.storage.locations import locate
from lightning_trak.storage.paths import local_directory
from tests.callback_nets import fit, steps
from tests.lit import TARGETS, TRAIN, make_model, make_trainer
from tests.snapshot_data import assert_equal, fill, make_state_dict

ODD = [
    "a::b",
    "memory::b",
    "C:",
    "C:\\b",
    "50%",
    "a%20b",
    "#1",
    "a b",
    "ä€",
    "what?",
    "[1]*",
    "~b",
    "x.pt",
    "-",
    "a\nb",
]


@pytest.mark.parametrize("name", ODD)
def test_odd_names_are_paths(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spellings = [tmp_path / name, f"{tmp_path}/{name}/", (tmp_path / name).as_uri(), f"./{name}"]
    for spelling in spellings:
        filesystem, path, _ = locate(spelling)
        assert isinstance(filesystem, LocalFileSystem)
        assert path == str(tmp_path / name)
    fill(spellings[0], (10,))
    assert os.listdir(tmp_path) == [name]
    for spelling in spellings:
        assert_equal(resolve_checkpoints(spelling)[0].load(), make_state_dict(10))


@pytest.mark.parametrize(
    "name", ["a::b.ckpt", "memory::x.pt", "100%.bin", "a#1.safetensors", "x::y.SAFETENSORS", "ü.Ckpt"]
)
def test_odd_names_of_checkpoint_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = fill(tmp_path / "run", (10,)).path("snapshot-00000010.safetensors")
    if name.lower().endswith(".safetensors"):
        os.rename(file, name)
    else:
        torch.save({"state_dict": make_state_dict(10)}, name)
    for spelling in (name, tmp_path / name, (tmp_path / name).as_uri()):
        assert_equal(resolve_checkpoints(spelling)[0].load(), make_state_dict(10))


def test_two_runs_whose_names_have_colons_are_two_directories(tmp_path: Path) -> None:
    for name in ("run::a", "run::b"):
        fit(TRAKCallback(tmp_path / name), max_epochs=1)
    assert sorted(os.listdir(tmp_path)) == ["run::a", "run::b"]
    assert [steps(tmp_path / name) for name in ("run::a", "run::b")] == [[4], [4]]


def test_home_and_links_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "real/deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real/deep")
    assert locate("~/run")[1] == str(tmp_path / "run")
    assert locate(tmp_path / "link/../run")[1] == str(tmp_path / "real/run")  # as the system has it
    assert SnapshotSeries(tmp_path / "link").url == SnapshotSeries(tmp_path / "real/deep").url


@pytest.mark.parametrize(
    ("location", "error", "message"),
    [
        ("", ValueError, "expected a path or URL, got ''"),
        ("a\0b", ValueError, "expected a path or URL"),
        (b"run", TypeError, "expected a path or URL as text, got bytes"),
        ("nothing://run", ValueError, r'fsspec does not understand the URL "nothing://run".*use a path'),
        ("memory://run/a::b", ValueError, r'"memory://run/a" takes no other'),
        ("memory://run/a::B", ValueError, r'"memory://run/a" takes no other'),
        ("simplecache::memory://a::B", ValueError, r'"memory://a" takes no other'),
        ("run::memory://a", ValueError, "fsspec does not understand the URL"),
        (Path("s3://bucket/run"), ValueError, 'pass it as text, "s3://bucket/run"'),
        (Path("memory://run"), ValueError, 'pass it as text, "memory://run"'),
    ],
)
def test_what_leads_nowhere_is_refused(location: object, error: type[Exception], message: str) -> None:
    for use in (SnapshotSeries, resolve_checkpoints, lambda directory: fit(TRAKCallback(directory))):
        if location == b"run" and use is resolve_checkpoints:
            continue  # bytes are none of the kinds of checkpoints
        with pytest.raises(error, match=message):
            use(location)  # type: ignore[operator]


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_paths_of_nothing_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match=r"expected the path of a store, got '.*'; \"\.\" is the working directory"):
        local_directory(path, "store")


def test_a_file_system_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(known_implementations, "away", {"class": "away.FileSystem", "err": "Get it"})
    with pytest.raises(ImportError, match=r'"away://run" needs a package that is not installed: Get it'):
        resolve_checkpoints("away://run")


def test_chains_of_file_systems_are_left_to_fsspec(tmp_path: Path) -> None:
    fill("memory://chained/run", (10,))
    found = resolve_checkpoints("simplecache::memory://chained/run/snapshot-00000010.safetensors")
    assert_equal(found[0].load(), make_state_dict(10))


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors", "run/manifest.json"])
def test_pipes_and_links_to_nothing_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for make, found in ((os.mkfifo, "no file"), (lambda path: os.symlink("gone", path), "a link to nothing")):
        make(tmp_path / name)
        with pytest.raises((ValueError, FileNotFoundError), match=f"{name}.*{found}|does not exist"):
            resolve_checkpoints(tmp_path / name.removesuffix("/manifest.json"))[0].load()
        (tmp_path / name).unlink()


def test_a_file_where_the_directory_should_be(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(NotADirectoryError, match="run"):
        fit(TRAKCallback(tmp_path / "run"))
    with pytest.raises(NotADirectoryError, match="run"):
        fit(TRAKCallback(tmp_path / "run/deeper"))
    assert (tmp_path / "run").read_text() == "mine"


def test_a_directory_stays_where_it_is_if_the_working_directory_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    method = GradientDot(make_model(), store="run/features")
    assert "store='run/features'" in repr(method)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert method.attribute(make_trainer(), TRAIN, TARGETS).shape == (len(TARGETS), len(TRAIN))
    assert (tmp_path / "run/features/manifest.json").is_file()
    assert not os.listdir()
