"""Directories with an identity: who gets one that several runs open at once."""

import copy
import errno
import fcntl
import os
import pickle

import pytest

from lightning_trak.storage.claims import ClaimedDirectory
from lightning_trak.storage.locks import Lock
from lightning_trak.storage.manifests import DirectoryKind
from tests.storage.boxes import claim, in_another_process, refusal, refuse_locks, tree, write_result


def test_what_lost_its_meaning_goes_with_the_claim(tmp_path):
    claim(tmp_path, 1)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/old").touch()
    (tmp_path / "other").touch()
    claim(tmp_path, 1)
    assert tree(tmp_path) == {"manifest.json", "notes", "notes/old", "other"}
    claim(tmp_path, 2)
    assert tree(tmp_path) == {"manifest.json", "notes", "other"}


def test_a_claim_lasts_as_long_as_its_holder(tmp_path, monkeypatch):
    holder = claim(tmp_path, 1)
    with pytest.raises(ValueError, match=refusal(1, 2)):
        in_another_process(monkeypatch, tmp_path, 2)
    second = in_another_process(monkeypatch, tmp_path, 1)
    del holder
    with pytest.raises(ValueError, match=refusal(1, 3)):
        claim(tmp_path, 3)
    second.require_unchanged()
    del second
    assert claim(tmp_path, 3).manifest["identity"] == {"seed": 3}


def test_who_was_refused_holds_nothing(tmp_path, monkeypatch):
    holder = claim(tmp_path, 1)
    with pytest.raises(ValueError, match=refusal(1, 2)) as caught:
        in_another_process(monkeypatch, tmp_path, 2)
    del holder
    claim(tmp_path, 3)
    assert caught.tb is not None  # keeps all that the refused one had


def test_a_result_settles_it(tmp_path, monkeypatch):
    claim(tmp_path, 1)
    write_result(tmp_path)
    before = tree(tmp_path)
    for _ in range(2):
        with pytest.raises(ValueError, match=refusal(1, 2)):
            claim(tmp_path, 2)
    mine = claim(tmp_path, 1)
    with pytest.raises(ValueError, match=refusal(1, 2)):
        in_another_process(monkeypatch, tmp_path, 2)
    assert tree(tmp_path) == before
    mine.require_unchanged()


def test_the_newest_run_of_a_process_has_the_directory(tmp_path, monkeypatch):
    first = claim(tmp_path, 1)
    second = claim(tmp_path, 2)
    with pytest.raises(RuntimeError, match=r"another run has taken box .* over; give each run a directory"):
        first.require_unchanged()
    second.require_unchanged()
    with pytest.raises(ValueError, match=refusal(2, 3)):
        in_another_process(monkeypatch, tmp_path, 3)
    del first
    with pytest.raises(ValueError, match=refusal(2, 3)):
        in_another_process(monkeypatch, tmp_path, 3)


def test_a_failed_claim_keeps_that_of_the_same_process(tmp_path, monkeypatch):
    mine, other = claim(tmp_path, 1), in_another_process(monkeypatch, tmp_path, 1)
    with pytest.raises(ValueError, match=refusal(1, 2)):
        claim(tmp_path, 2)
    del other
    with pytest.raises(ValueError, match=refusal(1, 3)):
        in_another_process(monkeypatch, tmp_path, 3)

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            claim(tmp_path, 2)
    in_another_process(monkeypatch, tmp_path, 1).require_unchanged()
    with pytest.raises(ValueError, match=refusal(1, 3)):
        in_another_process(monkeypatch, tmp_path, 3)
    mine.require_unchanged()


def test_without_locks_the_first_run_keeps_the_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", refuse_locks)
    first = claim(tmp_path, 1)
    with pytest.raises(ValueError, match=refusal(1, 2)):
        claim(tmp_path, 2)
    del first
    with pytest.raises(ValueError, match=refusal(1, 2)):
        claim(tmp_path, 2)
    claim(tmp_path, 1).require_unchanged()
    assert tree(tmp_path) == {"manifest.json"}


def test_a_manifest_that_was_replaced_on_another_machine_is_looked_for_again(tmp_path, monkeypatch):
    """On NFS, a lock may be asked for on a file that is no longer there."""
    claim(tmp_path, 1)
    flock, stale = fcntl.flock, []

    def once(*args):
        if not stale:
            stale.append(True)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        flock(*args)

    monkeypatch.setattr(fcntl, "flock", once)
    claim(tmp_path, 2).require_unchanged()
    assert stale


def test_a_reader_claims_nothing(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r'" is not a box of results yet; fill it first'):
        claim(tmp_path, 1, read_only=True)
    assert not tree(tmp_path)
    claim(tmp_path, 1)
    reader = claim(tmp_path, 1, read_only=True)
    with pytest.raises(ValueError, match=refusal(1, 2)):
        claim(tmp_path, 2, read_only=True)
    in_another_process(monkeypatch, tmp_path, 2)
    with pytest.raises(RuntimeError, match="taken box"):
        reader.require_unchanged()


def test_results_that_appear_with_their_manifest_are_not_orphans(tmp_path, monkeypatch):
    """Another process makes the manifest and a result after this one has seen that there is neither."""
    lexists, seen, others = os.path.lexists, [], []

    def raced(path):
        if not seen:
            seen.append(path)
            others.append(in_another_process(monkeypatch, tmp_path, 1))
            write_result(tmp_path)
            return False
        return lexists(path)

    monkeypatch.setattr(os.path, "lexists", raced)
    claim(tmp_path, 1).require_unchanged()
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r'" holds results but no manifest.json; use another directory'):
        claim(tmp_path, 1)


def test_the_first_run_settles_some_fields(tmp_path):
    first = claim(tmp_path, 1, size=4, count=2)
    second = claim(tmp_path, 1, size=8, count=2)
    assert second.manifest == first.manifest
    assert second.manifest["size"] == 4
    assert second.key == first.key
    write_result(tmp_path)
    with pytest.raises(ValueError, match="made with count 2, this run has count 3"):
        claim(tmp_path, 1, size=4, count=3)


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="it holds a value"):
        ClaimedDirectory(tmp_path, KIND_OF_NONE, {"identity": {}}, lambda *_: ("", ""), "run")
    assert not tree(tmp_path)


def no_value(field, value):
    raise ValueError(f"{field} holds a value")


KIND_OF_NONE = DirectoryKind("none", "none", 1, no_value, "", (), "*.txt", "results")


def test_a_copy_of_a_claim_is_no_claim(tmp_path, monkeypatch):
    mine = claim(tmp_path, 1)
    for copied in (pickle.loads(pickle.dumps(mine)), copy.deepcopy(mine)):
        copied.require_unchanged()
        assert copied.key == mine.key
        del copied
        with pytest.raises(ValueError, match=refusal(1, 2)):
            in_another_process(monkeypatch, tmp_path, 2)
    copied = pickle.loads(pickle.dumps(mine))
    del mine
    in_another_process(monkeypatch, tmp_path, 2)
    with pytest.raises(RuntimeError, match="another run has taken box"):
        copied.require_unchanged()


def test_a_lock_stays_with_its_file(tmp_path):
    path = tmp_path / "file"
    path.touch()
    lock = Lock(path)
    assert lock.take(shared=True)
    assert lock.is_on(path)
    path.rename(tmp_path / "renamed")
    path.touch()
    assert not lock.is_on(path)
    assert lock.is_on(tmp_path / "renamed")
    other, replacement = Lock(tmp_path / "renamed"), Lock(path)
    assert other.file == lock.file != replacement.file
    assert other.take(shared=True, wait=False)
    assert not other.take(wait=False)
    assert replacement.take(wait=False)
    path.unlink()
    assert not replacement.is_on(path)
    lock.close()
    assert other.take(wait=False)
    assert Lock(tmp_path).take(wait=False)


def test_a_file_that_one_may_only_read_can_be_locked(tmp_path, monkeypatch):
    path, opening = tmp_path / "file", os.open
    path.touch()

    def read_only(name, flags, *args, **options):
        if flags & os.O_RDWR:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opening(name, flags, *args, **options)

    monkeypatch.setattr(os, "open", read_only)
    assert Lock(path).take(wait=False)
    with pytest.raises(FileNotFoundError):
        Lock(tmp_path / "none")


def test_a_file_without_a_name_is_on_no_path(tmp_path, monkeypatch):
    """NFS may still lead to it; file systems that do not count names say so of everything."""

    def nameless(function):
        return lambda *args, **options: os.stat_result((*function(*args, **options)[:3], 0, *[0] * 6))

    path = tmp_path / "file"
    path.touch()
    lock = Lock(path)
    monkeypatch.setattr(os, "fstat", nameless(os.fstat))
    assert not lock.is_on(path)
    monkeypatch.setattr(os, "stat", nameless(os.stat))
    assert lock.is_on(path)
