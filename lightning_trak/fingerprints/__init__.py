"""What makes two runs the same: outputs, models, trainings and settings as JSON-able values that can be compared."""

import json
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_trak.fingerprints.classes import INITIAL, attributes_of, changed_by_use
from lightning_trak.fingerprints.modules import describe, new_fingerprint
from lightning_trak.fingerprints.values import Fingerprint
from lightning_trak.storage.schemas import are_same

__all__ = [
    "Fingerprint",
    "changes",
    "difference",
    "fingerprint",
    "module_fingerprint",
    "new_fingerprint",
    "object_fingerprint",
]

# Keys that sort what a fingerprint holds, and mean nothing to its reader.
_SORTS = ("attributes", "code", "made", "own", "state", "value")


def fingerprint(value: Any, owner: str | None = None) -> Any:
    """Any value and the code that it refers to, in JSON's types.

    Args:
        value: any.
        owner: who holds it. If there is one, the value is described in full, or refused; else objects that are no
            values stand by their class.

    Raises:
        TypeError: if there is an owner, and the value is or holds what has no content, such as a lock or an open file.
    """
    walk = new_fingerprint()
    described = walk.value(value, owner)
    code = walk.code()
    return {"value": described, "code": code} if code else described


def object_fingerprint(value: Any, called: frozenset[str], left_out: frozenset[str]) -> dict[str, Any]:
    """An object by its class, its attributes and its code, apart from what it changes itself when it is used.

    Args:
        value: the object.
        called: methods that are called from outside.
        left_out: methods that do not matter.

    Raises:
        TypeError: if a public attribute has no content. Others are described by their class then.
    """
    walk, cls = new_fingerprint(), type(value)
    name_of_class = walk.methods(cls, lambda name: name not in INITIAL | left_out)
    walk.read()
    changed = changed_by_use(cls, called)
    try:
        attributes = {
            name: walk.value(held, None if name.startswith("_") else f"{cls.__name__}.{name}")
            for name, held in (attributes_of(cls) | vars(value)).items()
            if name not in changed and (not name.startswith("_") or name in walk.names)
        }
    except TypeError as error:
        raise TypeError(
            f"{error}; override fingerprint(), or begin the attribute's name with an underscore if it does not change"
            " the output"
        ) from error
    return {"class": name_of_class, "attributes": attributes, "code": walk.code()}


def module_fingerprint(module: nn.Module, used_by: Any = None, training: bool = False) -> dict[str, Any]:
    """A module's code and options, without its weights.

    It is the same before and after training, of a copy, of what `torch.compile` makes of it, and in another process.

    Args:
        module: any module.
        used_by: what calls it, such as an output: the methods and attributes that its code names matter, too.
        training: whether what only training uses matters as well.

    Returns:
        The module's parts with their classes and options, and digests of functions and classes, by their names.
    """
    caller = new_fingerprint()
    caller.value(used_by)
    caller.read()
    walk = new_fingerprint()
    walk.names |= caller.names
    parts = describe(module, walk, training)
    return walk.code() | {f"module {name}".rstrip(): part for name, part in parts.items()}


def changes(theirs: Any, mine: Any) -> str:
    """In words, where two fingerprints differ; the first few places."""
    old, new = _flat(theirs), _flat(mine)
    if old.get("python") != new.get("python") and "python" in old and "python" in new:
        return f"Python is {new['python']} and was {old['python']}, so that code cannot be compared"
    differing = [name for name in old | new if not (name in old and name in new and are_same(old[name], new[name]))]
    differing.sort(key=lambda name: (name not in new, name not in old))  # what has changed, what is new, what is gone
    words = [_words(name, old.get(name, _MISSING), new.get(name, _MISSING)) for name in differing]
    return "; ".join(words[:3]) + (f"; and {len(words) - 3} more" if len(words) > 3 else "")


def difference(field: str, theirs: Any, mine: Any) -> tuple[str, str]:
    """In words, a field that two runs differ in.

    Returns:
        What theirs was made with, and what mine has, as in "made with seed 0, this one has seed 1".
    """
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        return f"another {field}", f"one that differs: {changes(theirs, mine)}"
    return f"{field} {theirs}", f"{field} {mine}"


_MISSING = object()


def _flat(value: Any, path: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {" ".join(part for part in path if part not in _SORTS) or " ".join(path): value}
    return {name: leaf for key, item in value.items() for name, leaf in _flat(item, (*path, str(key))).items()}


def _words(name: str, old: Any, new: Any) -> str:
    if old is _MISSING or new is _MISSING:
        return f"{name} is {'new' if old is _MISSING else 'gone'}"
    texts = [json.dumps(value, sort_keys=True) for value in (old, new)]
    if any(len(text) > (160 if text[0] == '"' else 60) or re.fullmatch('"[0-9a-f]{16}"', text) for text in texts):
        return f"{name} has changed"
    return f"{name} was {texts[0]} and is {texts[1]}"
