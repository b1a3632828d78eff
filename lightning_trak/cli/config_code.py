"""Which code a configuration of the command line may name.

jsonargparse imports what a file names. Where a class of some kind is expected it takes no other; but where any callable
will do it also takes ``os.system``, and calls it with arguments of the file. Three rules close this: nothing of the
standard library can be named; a function, and an object that is called, must be of the user's own code; and where a
type does not say what is expected, nothing is made.
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
    """Have jsonargparse import nothing of the standard library for a file, and make nothing where any type will do.

    It looks at the name before it imports anything, and afterwards at where the object was defined.
    """
    denied = sorted({*sys.stdlib_module_names, *sys.builtin_module_names})
    set_parsing_settings(import_path_denylist=denied, instantiate_subclass_spec_in_any=False)


def require_own_code(config: Namespace) -> None:
    """Refuse functions, and classes whose objects are called, that neither the user's code nor torch's layers define.

    Args:
        config: what was parsed; nothing has been made of it yet.

    Raises:
        ValueError: if it names such a one.
    """
    for place, named in _callables(config, ""):
        if inspect.isclass(named):
            called = any("__call__" in vars(base) for base in named.__mro__)
            module = sys.modules.get(named.__module__)
            if not called or issubclass(named, nn.Module) or (module and _is_own(vars(module))):
                continue
            kind, advice = "a class whose objects can be called", "derive a class of your own from it"
        elif _is_own(_surroundings(named)):
            continue
        else:
            kind, advice = "a function", "write one that calls it"
        name = f"{getattr(named, '__module__', None)}.{getattr(named, '__qualname__', type(named).__qualname__)}"
        raise ValueError(
            f"{place} names {name}, {kind} that no file of yours defines; a configuration may name functions of your"
            f" own modules only, so that it cannot run commands: {advice}"
        )


def _callables(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """What is or makes a function or an object, and where it stands."""
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
    """The globals of the module that defines a function, whatever it is wrapped in; empty if it is not Python's."""
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
    """Whether a module is neither installed, nor of the standard library, nor of this package."""
    if not isinstance(module.get("__file__"), str):
        return False
    file = Path(module["__file__"]).resolve()
    return not (_INSTALLED & set(file.parts) or {_PACKAGE, _STANDARD_LIBRARY} & set(file.parents))
