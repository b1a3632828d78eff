"""Boxes of results: directories with an identity, as small as can be."""

import errno
import os
from weakref import WeakValueDictionary

from lightning_trak.storage import claims
from lightning_trak.storage.claims import ClaimedDirectory
from lightning_trak.storage.files import write_atomically
from lightning_trak.storage.manifests import DirectoryKind
from lightning_trak.storage.schemas import anything, integer, sealed

SEALED = sealed({"format": integer(1, 1), "identity": anything}, others=anything)


def manifest(field, value):
    SEALED(field, value)


KIND = DirectoryKind(
    name="box of results",
    short_name="box",
    version=1,
    schema=manifest,
    advice="fill it first",
    folders=("results",),
    results="results/*.txt",
    results_name="results",
    remains=("notes/*",),
    settled=("size",),
)


def difference(field, theirs, mine):
    return f"{field} {theirs}", f"{field} {mine}"


def claim(directory, seed, read_only=False, **others):
    content = {"identity": {"seed": seed}, **others}
    return ClaimedDirectory(directory, KIND, content, difference, "run", read_only)


def refusal(made, have):
    return rf'^box ".*" was made with seed {made}, this run has seed {have}; use another directory or the same seed, or'


def in_another_process(monkeypatch, directory, seed):
    """Open a directory as another process would: it shares no lock with this one."""
    with monkeypatch.context() as patched:
        patched.setattr(claims, "_held", WeakValueDictionary())
        return claim(directory, seed)


def write_result(directory):
    write_atomically(directory / "results/one.txt", lambda path: path.write_text("1"))


def tree(directory):
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


def refuse_links(*args, **options):
    raise PermissionError(errno.EPERM, "Operation not permitted")


def refuse_locks(*args):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
