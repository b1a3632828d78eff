"""What another run has left is deleted if the user says so, and nothing else is."""

import errno
import fcntl
import os
import signal
from functools import partial
from weakref import WeakValueDictionary

import pytest
import torch

from lightning_trak import TRAK
from lightning_trak.features.rows import Features
from lightning_trak.features.store import FeatureStore
from lightning_trak.methods import ExactKernel
from lightning_trak.projections import SparseProjection
from lightning_trak.retraining.fleets.members import Member, MemberStore
from lightning_trak.storage import claims, discarding
from tests.launch import run_script
from tests.lit import TARGETS, TRAIN, make_model, make_trainer

IDENTITY = {"seed": 0, "dtype": "float32", "checkpoints": ["aa", "bb"]}
MASKS = torch.tensor([[True, False, True], [False, True, True]])
FLEET = {"num_targets": 2, "seed": 0}


def rows(count):
    return Features(torch.ones(count, 4), *torch.ones(3, count))


def open_store(directory, seed=0, checkpoints=("aa", "bb"), size=10, **options):
    return FeatureStore(directory, IDENTITY | {"seed": seed, "checkpoints": list(checkpoints)}, size, 4, **options)


def fill(store):
    for checkpoint in range(store.num_checkpoints):
        for shard in store.missing(checkpoint):
            store.write(checkpoint, shard, rows(len(store.shard(shard))))
        store.write_extra(checkpoint, "gram-identity", {"gram": torch.ones(2)}, "key")
    store.write_examples({"x": torch.ones(1)})
    store.settle_engine("hooks")


def names(directory):
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def made(tmp_path):
    fill(open_store(tmp_path))
    for name in ("notes.txt", "checkpoint-aa/notes.txt", "checkpoint-aa/shard-1.safetensors", "other/x.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    return tmp_path


MINE = {"notes.txt", "checkpoint-aa/notes.txt", "checkpoint-aa/shard-1.safetensors", "other/x.json"}


def test_a_store_of_another_identity_is_deleted_and_the_users_files_stay(made):
    before = names(made)
    with pytest.raises(ValueError, match="or the same seed, or overwrite=True, which deletes this store"):
        open_store(made, seed=1)
    with pytest.raises(TypeError, match="overwrite must be True or False; got 'no'"):
        open_store(made, seed=1, overwrite="no")
    assert names(made) == before
    store = open_store(made, seed=1, overwrite=True)
    assert names(made) == MINE | {"manifest.json", "readers.lock"}
    assert store.missing(0) == [0, 1, 2]
    assert not (made / "checkpoint-bb").exists()


@pytest.mark.parametrize("size", [9, 11])
def test_a_store_of_other_data_is_deleted(made, size):
    assert open_store(made, size=size, overwrite=True).num_examples == size
    assert names(made) == MINE | {"manifest.json", "readers.lock"}


def test_what_is_right_is_kept(made):
    before = {name: (made / name).stat().st_mtime_ns for name in names(made)}
    open_store(made, overwrite=True).require_complete()
    assert {name: (made / name).stat().st_mtime_ns for name in names(made)} == before
    store = open_store(made, checkpoints=["cc", "aa"], overwrite=True)
    assert store.missing(1) == []
    assert not any("checkpoint-bb" in name for name in names(made))


def other_process(monkeypatch):
    """Locks of this process do not count any more as its own."""
    monkeypatch.setattr(claims, "_held", WeakValueDictionary())
    monkeypatch.setattr(discarding, "_SECONDS", 0.1)


@pytest.mark.parametrize("read_only", [True, False], ids=["read", "written"])
def test_a_store_that_another_process_uses_is_not_overwritten(made, monkeypatch, read_only):
    before, user = names(made), open_store(made, read_only=read_only)
    other_process(monkeypatch)
    with pytest.raises(ValueError, match="cannot be overwritten: another process uses it"):
        open_store(made, seed=1, overwrite=True)
    open_store(made, checkpoints=["aa"], overwrite=True)
    assert names(made) == before
    user.require_complete()
    del user
    open_store(made, seed=1, overwrite=True)
    assert names(made) == MINE | {"manifest.json", "readers.lock"}


def test_a_store_is_not_overwritten_where_there_are_no_locks(made, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    before = names(made)
    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ValueError, match="cannot be overwritten: its file system has no locks"):
        open_store(made, seed=1, overwrite=True)
    open_store(made, overwrite=True).require_complete()
    assert names(made) == before


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_deletes_leaves_the_old_store_with_fewer_shards(made):
    script = made.with_suffix(".py")
    script.write_text(
        "import os; from pathlib import Path; from tests.storage.test_overwriting import open_store\n"
        "unlink, left = Path.unlink, [7]\n"
        "def kill(*args, **options):\n"
        "    left[0] -= 1\n"
        "    os.kill(os.getpid(), 9) if left[0] < 0 else unlink(*args, **options)\n"
        f"Path.unlink = kill; open_store({str(made)!r}, seed=1, overwrite=True)"
    )
    assert run_script(script) == -signal.SIGKILL
    store = open_store(made)
    assert 0 < sum(len(store.missing(checkpoint)) for checkpoint in range(2)) <= 6
    fill(store)
    store.require_complete()
    del store
    open_store(made, seed=1, overwrite=True)
    assert names(made) == MINE | {"manifest.json", "readers.lock"}


def test_a_fleet_is_overwritten(tmp_path):
    fleet = MemberStore(tmp_path, FLEET, MASKS)
    fleet.write(Member(0, 0), torch.ones(2), {}, weights={"w": torch.ones(1)})
    fleet.record_failure(Member(1, 0), ValueError("no"))
    (tmp_path / "members/notes.txt").write_text("mine")
    del fleet
    with pytest.raises(ValueError, match="or overwrite=True, which deletes this fleet"):
        MemberStore(tmp_path, FLEET | {"seed": 1}, MASKS)
    assert Member(0, 0) in MemberStore(tmp_path, FLEET, MASKS, overwrite=True)
    fleet = MemberStore(tmp_path, FLEET | {"seed": 1}, MASKS, overwrite=True)
    assert names(tmp_path) == {"manifest.json", "masks.safetensors", "members/notes.txt"}
    assert not fleet.finished()


@pytest.mark.parametrize(
    "make", [TRAK, partial(TRAK, projection=SparseProjection(16)), ExactKernel], ids=["dual", "primal", "exact"]
)
def test_nothing_that_a_method_has_written_stays(tmp_path, checkpoints, make):
    method = make(make_model(), checkpoints, tmp_path)
    method.attribute(make_trainer(), TRAIN, TARGETS)
    assert any("shard-00000" not in name for name in names(tmp_path))
    FeatureStore(tmp_path, IDENTITY, 10, overwrite=True)
    assert names(tmp_path) == {"manifest.json", "readers.lock"}
    assert not list(tmp_path.glob("checkpoint-*"))
