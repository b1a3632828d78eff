"""Locations of files: paths on this machine, and URLs."""

from __future__ import annotations

import inspect
import os
import re
from typing import Any, NamedTuple
from urllib.parse import unquote

from fsspec import available_protocols, get_filesystem_class
from fsspec.core import split_protocol, url_to_fs
from fsspec.implementations.local import LocalFileSystem

_URL = re.compile(r"[A-Za-z][\w+.-]+(://|::.*://)", re.DOTALL)
_LOCAL_URL = re.compile(r"(file|local)://|file:(?=/)")


class Location(NamedTuple):
    """A place for a file or directory, which messages show as the user wrote it.

    Attributes:
        filesystem: an fsspec file system.
        path: on this file system.
        name: as the user wrote it.
    """

    filesystem: Any
    path: str
    name: str

    def __str__(self) -> str:
        return self.name

    @property
    def is_local(self) -> bool:
        """Whether it is a path of this machine."""
        return isinstance(self.filesystem, LocalFileSystem)

    def inside(self, name: str) -> Location:
        """The place of a file or directory in this directory."""
        return self._replace(path=f"{self.path.rstrip('/')}/{name}", name=f"{self.name.rstrip('/')}/{name}")

    def require_regular(self) -> None:
        """Check that a local path is a regular file or does not exist. A pipe, for example, would block the reader.

        Raises:
            ValueError: if it is something else, or a broken link.
        """
        path = self.path
        if self.is_local and os.path.lexists(path) and not os.path.isfile(path):
            found = "a directory" if os.path.isdir(path) else "a link to nothing" if os.path.islink(path) else "no file"
            raise ValueError(f'"{path}" is {found}, and a file was expected; move it away')


def locate(location: str | os.PathLike[str]) -> Location:
    """Find the file system of a path or URL.

    A text that does not begin like a URL is a local path, even with special characters: ``a::b``, ``50%``, ``#1``.
    Local paths become absolute, and ``~`` and symbolic links are resolved, so that each file has one name only.

    Args:
        location: a path, or a URL that fsspec understands, such as ``s3://bucket/run`` or ``file:///home/me/run``.

    Raises:
        TypeError: if the location is not text.
        ValueError: if it is empty, or if fsspec does not understand the URL.
        ImportError: if the URL needs a package that is not installed.
    """
    text = os.fspath(location)
    if not isinstance(text, str):
        raise TypeError(f"expected a path or URL as text, got {type(text).__name__} {text!r}")
    if not text or "\0" in text:
        raise ValueError(f"expected a path or URL, got {text!r}")
    local_url = _LOCAL_URL.match(text)
    if local_url:
        return _local(unquote(text[local_url.end() :]), text)
    scheme, found, rest = text.partition(":/")
    if found and not rest.startswith("/") and scheme in available_protocols():
        raise ValueError(f'"{text}" is a URL that pathlib has shortened; pass it as text, "{scheme}://{rest}"')
    if not _URL.match(text):
        return _local(text, text)
    try:
        _require_chain(text.split("::"))
        filesystem, path = url_to_fs(text)
    except ImportError as error:
        raise ImportError(f'"{text}" needs a package that is not installed: {error}') from error
    except ValueError as error:
        raise ValueError(
            f'fsspec does not understand the URL "{text}" ({error}); use a path, or a URL such as "s3://bucket/run"'
        ) from error
    return Location(filesystem, str(path), text)


def _local(path: str, name: str) -> Location:
    return Location(LocalFileSystem(), os.path.realpath(os.path.expanduser(path)), name)


def _require_chain(bits: list[str]) -> None:
    """Refuse "::" after a file system that takes no other file system, since fsspec would ignore the rest."""
    for bit in bits[:-1]:
        kinds = get_filesystem_class(split_protocol(bit)[0] or bit).__mro__
        if not any("target_protocol" in inspect.signature(kind.__init__).parameters for kind in kinds):
            raise ValueError(f'"::" chains file systems, but "{bit}" takes no other file system')
