"""Fingerprints: outputs, models, trainings and settings as values in JSON's types, to compare two runs."""

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

# Keys that only group the parts of a fingerprint. Messages leave them out.
_SORTS = ("attributes", "code", "made", "own", "state", "value")


def fingerprint(value: Any, owner: str | None = None) -> Any:
    """Any value and the code that it refers to, in JSON's types.

    Args:
        value: the value.
        owner: the name of the object that holds the value, for errors. If it is given, the value is described in full,
            or refused. Without an owner, only the class counts for objects of installed packages that are not values.

    Raises:
        TypeError: if there is an owner, and the value is or holds an object that cannot be described, such as a lock or
            an open file.
    """
    walk = new_fingerprint()
    described = walk.value(value, owner)
    code = walk.code()
    return {"value": described, "code": code} if code else described


def object_fingerprint(value: Any, called: frozenset[str], left_out: frozenset[str]) -> dict[str, Any]:
    """An object by its class, its attributes and its code, without attributes that it changes itself when used.

    Args:
        value: the object.
        called: methods that other code calls.
        left_out: methods that do not count.

    Raises:
        TypeError: if a public attribute cannot be described. For a private one, only its class counts then.
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
            f"{error}; override fingerprint(), or, if the attribute does not change the output, let its name begin with"
            " an underscore"
        ) from error
    return {"class": name_of_class, "attributes": attributes, "code": walk.code()}


def module_fingerprint(module: nn.Module, used_by: Any = None, training: bool = False) -> dict[str, Any]:
    """A module's code and options, without its weights.

    It is the same before and after training, for a copy, for a compiled module, and in another process.

    Args:
        module: any module.
        used_by: an object that calls the module, such as an output. Methods and attributes that its code names count,
            too.
        training: whether methods and attributes that only training uses count as well.

    Returns:
        The module's parts with their classes and options, and digests of functions and classes, by name.
    """
    caller = new_fingerprint()
    caller.value(used_by)
    caller.read()
    walk = new_fingerprint()
    walk.names |= caller.names
    parts = describe(module, walk, training)
    return walk.code() | {f"module {name}".rstrip(): part for name, part in parts.items()}


def changes(theirs: Any, mine: Any) -> str:
    """A text that names the first three places where two fingerprints differ, and counts the others."""
    old, new = _flat(theirs), _flat(mine)
    if old.get("python") != new.get("python") and "python" in old and "python" in new:
        return f"Python is {new['python']} and was {old['python']}, so code cannot be compared"
    differing = [name for name in old | new if not (name in old and name in new and are_same(old[name], new[name]))]
    differing.sort(key=lambda name: (name not in new, name not in old))  # changed, then new, then gone
    words = [_words(name, old.get(name, _MISSING), new.get(name, _MISSING)) for name in differing]
    return "; ".join(words[:3]) + (f"; and {len(words) - 3} more" if len(words) > 3 else "")


def difference(field: str, theirs: Any, mine: Any) -> tuple[str, str]:
    """Two texts about a field that differs between two runs.

    Args:
        field: the name of the field.
        theirs: its value in the other run.
        mine: its value in this run.

    Returns:
        The value of the other run and the value of this run, as in "made with seed 0, this one has seed 1".
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
