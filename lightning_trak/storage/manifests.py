"""The manifest of a directory that belongs to one identity, and what the directories of a kind have in common."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from lightning_trak.storage.files import DamagedFileError, read_json
from lightning_trak.storage.paths import local_directory
from lightning_trak.storage.schemas import Schema, anything, record

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class DirectoryKind:
    """A kind of directory, and what all directories of this kind have in common.

    Attributes:
        name: its name in the message that there is none, such as ``"feature store"``.
        short_name: its name in other messages, such as ``"store"``.
        version: the ``"format"`` in the manifest that this version reads.
        schema: the schema of the manifest, with a checksum. A function at the top of a module can be pickled.
        advice: what to do if there is no such directory, such as ``"call featurize first"``.
        folders: patterns of the folders in the directory that files are written to.
        results: pattern of result files. If a directory has one, its identity cannot be replaced.
        results_name: the name of results in messages, such as ``"shards"``.
        remains: patterns of other files that lose their meaning with the identity.
        settled: fields of the manifest that the first run decides. Later runs may ask for other values of them.
        growing: fields of the manifest that a later run may extend.
        files: regular expressions of the paths of all files that runs write, other than the manifest.
        readers: name of the file that processes which read for long share a lock on; None: there is none.
    """

    name: str
    short_name: str
    version: int
    schema: Schema
    advice: str
    folders: tuple[str, ...]
    results: str
    results_name: str
    remains: tuple[str, ...] = ()
    settled: tuple[str, ...] = ()
    growing: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    readers: str | None = None


def read_manifest(directory: str | os.PathLike[str], kind: DirectoryKind) -> dict[str, Any]:
    """The manifest of a directory.

    Args:
        directory: the directory.
        kind: the kind of directory that is expected.

    Raises:
        FileNotFoundError: if there is no manifest.
        ValueError: if the manifest is not of this kind, or has another format.
        OSError: if it cannot be read.
    """
    path = local_directory(directory, kind.name) / MANIFEST

    def check(field: str, value: Any) -> None:
        record({"format": anything}, others=anything)(field, value)
        if value["format"] == kind.version:
            kind.schema(field, value)

    try:
        manifest: dict[str, Any] = read_json(path, check)
    except FileNotFoundError as error:
        if path.is_symlink():
            raise ValueError(
                f'"{path}" is a link to "{os.readlink(path)}", which does not exist; restore that file, or use another'
                " directory"
            ) from error
        raise FileNotFoundError(f'"{directory}" is not a {kind.name} yet; {kind.advice}') from error
    except DamagedFileError as error:
        raise ValueError(
            f'"{path}" is not the manifest of a {kind.name}: it {error.reason}; restore it, or use another directory'
        ) from error
    if manifest["format"] != kind.version:
        raise ValueError(
            f'{kind.name} "{directory}" has format {manifest["format"]}; this version reads {kind.version}. Another'
            " version has made it, or it is a directory of another kind, such as snapshots: use another directory"
        )
    return manifest
