"""Files on odd file systems, of killed processes, and of users who may not read them."""

import errno
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from lightning_trak import TRAK
from lightning_trak.projections import SparseProjection
from lightning_trak.reporting.scores import SavedScores
from lightning_trak.storage.files import (
    DamagedFileError,
    load_metadata,
    load_tensors,
    read_json,
    remove_leftovers,
    save_tensors,
    write_atomically,
    write_json,
)
from lightning_trak.storage.paths import local_directory, local_file, local_path
from lightning_trak.storage.schemas import anything
from tests.lit import TARGETS, TRAIN, make_model, make_trainer

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([True, False])}


def tree(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


@contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o007])
def test_files_are_made_with_the_umask(tmp_path, mask):
    def as_safetensors_does(path):
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))

    with umask(mask):
        save_tensors(tmp_path / "tensors", TENSORS)
        write_json(tmp_path / "json", {})
        write_json(tmp_path / "new", {}, replace=False)
        write_atomically(tmp_path / "library", as_safetensors_does)
        SavedScores(torch.randn(2, 3), 3, "TRAK").save(tmp_path / "scores")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(["tensors", "json", "new", "library", "scores"], 0o666 & ~mask)


@pytest.fixture
def private():
    """A folder that any user may search, with files that only their owner may read, seen by somebody else."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        save_tensors(Path(folder) / "tensors", TENSORS)
        write_json(Path(folder) / "json", {})
        SavedScores(torch.randn(2, 3), 3, "TRAK").save(Path(folder) / "scores")
        for path in Path(folder).iterdir():
            path.chmod(0)
        user = os.geteuid()
        if user == 0:  # for whom permissions do not count
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            os.seteuid(user)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("tensors", load_tensors),
        ("tensors", load_metadata),
        ("json", lambda path: read_json(path, anything)),
        ("scores", SavedScores.load),
    ],
)
def test_what_one_may_not_read_is_not_called_damaged(private, name, read):
    with pytest.raises(PermissionError, match=rf"Permission denied: '.*/{name}'"):
        read(private / name)


def test_errors_of_reading_are_not_damage(tmp_path, monkeypatch):
    save_tensors(tmp_path / "tensors", TENSORS)
    for said in (OSError("Input/output error (os error 5)"), SafetensorError("I/O error: failed (os error 5)")):

        def fail(*args, said=said, **options):
            raise said

        monkeypatch.setattr("lightning_trak.storage.files.safe_open", fail)
        with pytest.raises(OSError, match=r"tensors.*Input/output error|Input/output error.*tensors"):
            load_tensors(tmp_path / "tensors")


@contextmanager
def files_limited_to(size):
    """A disk on which no more fits into a file."""
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_an_os_error_and_loses_nothing(tmp_path):
    save_tensors(tmp_path / "tensors", TENSORS)
    before = (tmp_path / "tensors").read_bytes()
    with files_limited_to(10_000), pytest.raises(OSError, match="tensors") as raised:
        save_tensors(tmp_path / "tensors", {"a": torch.zeros(10_000)})
    assert raised.value.errno == errno.EFBIG
    assert (tmp_path / "tensors").read_bytes() == before
    assert tree(tmp_path) == ["tensors"]


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES, errno.EDQUOT])
def test_scores_can_be_had_where_nothing_can_be_written(tmp_path, monkeypatch, checkpoints, expected, number):
    TRAK(make_model(), checkpoints, tmp_path, projection=SparseProjection(32)).featurize(make_trainer(), TRAIN)
    before, mkdir = tree(tmp_path), os.mkdir

    def refuse(path, *args, **options):
        if str(path).startswith(str(tmp_path)):
            raise OSError(number, os.strerror(number), str(path))
        mkdir(path, *args, **options)

    monkeypatch.setattr(os, "mkdir", refuse)
    trak = TRAK(make_model(), checkpoints, tmp_path, projection=SparseProjection(32))
    with pytest.warns(UserWarning, match="Gram matrix cannot be kept") as caught:
        assert torch.equal(trak.attribute(make_trainer(), TRAIN, TARGETS), expected)
    assert sum("Gram matrix" in str(warning.message) for warning in caught) == 1
    assert tree(tmp_path) == before


LINK_ERRORS = [
    PermissionError(errno.EPERM, "Operation not permitted"),
    PermissionError("refused"),
    OSError(errno.ENOTSUP, "Operation not supported"),
    OSError(errno.ENOSYS, "Function not implemented"),
    OSError(errno.EXDEV, "Invalid cross-device link"),
]


@pytest.fixture(params=[None, *LINK_ERRORS], ids=lambda error: "links" if error is None else repr(error))
def links(request, monkeypatch):
    """With hard links, and without."""

    def refuse(*args, **options):
        raise request.param

    if request.param is not None:
        monkeypatch.setattr(os, "link", refuse)


def test_one_of_many_writers_is_first(links, tmp_path):
    path, start, won = tmp_path / "manifest.json", threading.Barrier(8), []

    def write(number):
        start.wait()
        try:
            write_json(path, {"writer": number, "long": "x" * 10_000}, replace=False)
        except FileExistsError:
            return
        won.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert json.loads(path.read_text())["writer"] == won[0]
    assert tree(tmp_path) == ["manifest.json"]


def test_what_stands_there_is_kept(links, tmp_path):
    write_json(tmp_path / "file", {"first": True}, replace=False)
    with pytest.raises(FileExistsError):
        write_json(tmp_path / "file", {"first": False}, replace=False)
    assert json.loads((tmp_path / "file").read_text()) == {"first": True}
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        write_json(tmp_path / "link", {}, replace=False)
    assert tree(tmp_path) == ["file", "link"]


def test_a_stop_before_the_move_leaves_no_file_and_no_lock(links, tmp_path, monkeypatch):
    move = "replace" if os.link.__name__ == "refuse" else "link"

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, move, stop)
        with pytest.raises(KeyboardInterrupt):
            write_json(tmp_path / "file", {}, replace=False)
    assert tree(tmp_path) == []
    write_json(tmp_path / "file", {}, replace=False)
    assert tree(tmp_path) == ["file"]


def test_a_file_system_without_links_and_locks_is_refused(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(OSError, match=r"neither hard links nor locks .*No locks available.*; use another directory"):
        write_json(tmp_path / "file", {}, replace=False)
    assert tree(tmp_path) == []
    write_json(tmp_path / "file", {})
    assert tree(tmp_path) == ["file"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS])
def test_directories_that_cannot_be_flushed(tmp_path, monkeypatch, number):
    fsync, flushed = os.fsync, []

    def files_alone(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)
        flushed.append(descriptor)

    monkeypatch.setattr(os, "fsync", files_alone)
    save_tensors(tmp_path / "file", TENSORS)
    assert torch.equal(load_tensors(tmp_path / "file")[0]["a"], TENSORS["a"])
    assert len(flushed) == 1


@pytest.mark.parametrize("kind", [stat.S_ISDIR, stat.S_ISREG])
def test_a_disk_that_fails_is_heard(tmp_path, monkeypatch, kind):
    fsync = os.fsync

    def fail(descriptor):
        if kind(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        save_tensors(tmp_path / "file", TENSORS)


def test_what_dead_processes_were_writing_is_removed(tmp_path):
    names = []
    write_atomically(tmp_path / "a.file", lambda path: (names.append(path.parent.name), path.write_text("")))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (living,), mine, host = names, f"-{os.getpid()}-", names[0].split(".")[-2].split("-")[0]
    of_the_dead = living.replace(mine, f"-{dead.pid}-")
    elsewhere, long_ago = living.replace(host, "0" * 12), of_the_dead.replace(host, "1" * 12)
    others = [".file.tmp", f"a{of_the_dead}", of_the_dead.replace(".tmp", ".bak")]
    for name in [living, of_the_dead, elsewhere, long_ago, *others]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.file").write_text("half")
        (tmp_path / name / ".tmpAbC123").write_text("what a library keeps there")
    os.utime(tmp_path / long_ago, (0, 0))
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a.file", living, elsewhere, *others}
    remove_leftovers(tmp_path / "no folder yet")


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/run",
        "gs://bucket/run",
        "hf://datasets/x",
        "memory://x",
        "S3://b",
        "simplecache::s3://bucket/run",
        Path("s3://bucket/run"),
    ],
)
def test_a_url_is_no_directory(tmp_path, monkeypatch, url):
    monkeypatch.chdir(tmp_path)
    for function in (local_path, local_directory):
        with pytest.raises(ValueError, match=r"a store must be on a disk, .*got \".*; mount the bucket .* local path"):
            function(url, "store")
    with pytest.raises(ValueError, match="a store must be on a disk"):
        TRAK(make_model(), [make_model().state_dict()], url)
    with pytest.raises(ValueError, match="must be on a disk"):
        SavedScores(torch.zeros(1, 1), 1, "TRAK").save(url)
    assert tree(tmp_path) == []


def test_a_url_of_a_file_is_given_as_its_path():
    with pytest.raises(ValueError, match="give the path alone, without the scheme"):
        local_directory("file:///data/run", "fleet")


@pytest.mark.parametrize("path", ["a:/b", "a::b", "x/s3:y", "plain", "with space/ümlaut"])
def test_other_paths_are_paths(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert local_path(path, "store") == Path(path)
    assert local_directory(path, "store") == tmp_path / path


def _no_space(_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as Path.write_text does: it names no file


@pytest.mark.parametrize(
    ("make", "write", "number"),
    [
        (Path.mkdir, lambda file: file.write_text("x"), errno.EISDIR),
        (lambda path: None, _no_space, errno.ENOSPC),
        (lambda path: path.parent.chmod(0o500), lambda file: file.write_text("x"), errno.EACCES),
    ],
)
def test_an_error_of_writing_names_the_file(tmp_path, make, write, number):
    """Not the temporary one, nor none, for which the command line would print a traceback."""
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    make(path)
    if number == errno.EACCES and os.access(path.parent, os.W_OK):
        pytest.skip("root may write everywhere")
    with pytest.raises(OSError, match=os.strerror(number)) as raised:
        write_atomically(path, write)
    assert (raised.value.errno, raised.value.filename) == (number, str(path))


def test_a_directory_is_no_file(tmp_path):
    assert local_file(tmp_path / "new", "file of scores") == tmp_path / "new"
    with pytest.raises(IsADirectoryError, match="is a directory, and a file of scores would take its place; use"):
        local_file(tmp_path, "file of scores")
    (tmp_path / "file").write_text("")
    for below in ("file/new", "file/deep/new"):
        with pytest.raises(
            NotADirectoryError, match=r'file" is a file, not a directory, so it cannot hold a file of sc'
        ):
            local_file(tmp_path / below, "file of scores")


def test_something_else_in_the_place_of_a_directory(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "good").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    for name, said in [
        ("file", 'file" is a file, not a directory, so it cannot hold a store'),
        ("file/below/it", 'file" is a file, not a directory'),
        ("fifo", 'fifo" is a FIFO, not a directory'),
        ("dangling", r'dangling" is a link to ".*nowhere", which does not exist.*make that directory, or remove'),
        ("dangling/below", 'dangling" is a link'),
    ]:
        with pytest.raises(NotADirectoryError, match=said):
            local_directory(tmp_path / name, "store")
        with pytest.raises(NotADirectoryError, match=said):
            TRAK(make_model(), [make_model().state_dict()], tmp_path / name)
    assert local_directory(tmp_path / "good/new/store", "store") == tmp_path / "good/new/store"
    with pytest.raises(NotADirectoryError, match=r"Not a directory: .*file'"):
        write_json(tmp_path / "file" / "json", {})
    with pytest.raises(ValueError, match="home directory of an unknown user"):
        local_directory("~no-such-user-anywhere/store", "store")


def make_fifo(path):
    os.mkfifo(path)


@pytest.mark.parametrize(("make", "kind"), [(make_fifo, "a FIFO"), (Path.mkdir, "a directory")])
def test_what_is_no_file_is_refused_at_once(tmp_path, make, kind):
    make(tmp_path / "it")
    for read in (load_tensors, load_metadata, lambda path: read_json(path, anything)):
        with pytest.raises(DamagedFileError, match=rf'it" is {kind}, not a file'):
            read(tmp_path / "it")


def test_a_header_that_was_altered_is_found(tmp_path):
    path = tmp_path / "file"
    save_tensors(path, TENSORS, engine="hooks", count=1)
    whole = path.read_bytes()
    for old, new in [(b"hooks", b"hookz"), (rb"\"count\": 1", rb"\"count\": 2"), (rb"\"engine\"", rb"\"engina\"")]:
        assert old in whole
        path.write_bytes(whole.replace(old, new))
        for read in (load_tensors, load_metadata):
            with pytest.raises(DamagedFileError, match="in its header, its checksum does not match its content"):
                read(path)
