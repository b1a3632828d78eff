"""Which code a configuration of the command line may name.

jsonargparse imports the names in a configuration file. If a subclass is expected, it accepts nothing else. But if any
callable is allowed, it also accepts ``os.system``, and calls it with arguments from the file. Three rules prevent this:

- The standard library cannot be named.
- A function, or an object that is called, must come from the user's own code.
- If a type accepts anything, no object is made.
"""

from __future__ import annotations

import functools
import inspect
import os
import pkgutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jsonargparse import Namespace, set_parsing_settings
from torch import nn

_PACKAGE = Path(__file__).resolve().parents[1]
_STANDARD_LIBRARY = Path(os.__file__).resolve().parent
_INSTALLED = {"site-packages", "dist-packages"}


def deny_standard_library() -> None:
    """Forbid jsonargparse to import from the standard library, and to make objects where any type is accepted.

    jsonargparse checks a name before it imports anything, and after that it checks where the object was defined.
    """
    denied = sorted({*sys.stdlib_module_names, *sys.builtin_module_names})
    set_parsing_settings(import_path_denylist=denied, instantiate_subclass_spec_in_any=False)


def require_own_code(config: Namespace) -> None:
    """Refuse functions, and classes with callable objects, that do not come from the user's code. Layers are allowed.

    Args:
        config: the parsed configuration. No objects have been made from it yet.

    Raises:
        ValueError: if it names such a function or class.
    """
    for place, named in _callables(config, ""):
        if inspect.isclass(named):
            called = any("__call__" in vars(base) for base in named.__mro__)
            module = sys.modules.get(named.__module__)
            if not called or issubclass(named, nn.Module) or (module and _is_own(vars(module))):
                continue
            kind, advice = "a class with callable objects", "derive your own class from it"
        elif _is_own(_surroundings(named)):
            continue
        else:
            kind, advice = "a function", "write your own function that calls it"
        name = f"{getattr(named, '__module__', None)}.{getattr(named, '__qualname__', type(named).__qualname__)}"
        raise ValueError(
            f"{place} names {name}, {kind} that is not from your own code; a configuration may only name functions of"
            f" your own modules, so that it cannot run commands: {advice}"
        )


def _callables(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Yield each callable, and each class from which an object will be made, with its place in the configuration."""
    if isinstance(value, Namespace):
        value = vars(value)
        if isinstance(value.get("class_path"), str):
            yield place, pkgutil.resolve_name(value["class_path"])
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _callables(item, f"{place}.{name}" if place else str(name))
    elif isinstance(value, (list, tuple, set, frozenset)):
        for number, item in enumerate(value):
            yield from _callables(item, f"{place}[{number}]")
    elif callable(value) and not isinstance(value, (type, os.PathLike)):
        yield place, value


def _surroundings(function: Any) -> Mapping[str, Any]:
    """The globals of the module that defines a function, without its wrappers; empty if it is not written in Python."""
    while True:
        if isinstance(function, functools.partial):
            function = function.func
        elif inspect.ismethod(function):
            function = function.__func__
        elif hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        elif inspect.isroutine(function):
            return getattr(function, "__globals__", {})
        else:
            function = type(function).__call__


def _is_own(module: Mapping[str, Any]) -> bool:
    """Whether a module is the user's: not installed, not in the standard library, and not in this package."""
    if not isinstance(module.get("__file__"), str):
        return False
    file = Path(module["__file__"]).resolve()
    return not (_INSTALLED & set(file.parts) or {_PACKAGE, _STANDARD_LIBRARY} & set(file.parents))
