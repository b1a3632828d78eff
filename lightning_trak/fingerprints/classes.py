"""Classes: whether the user wrote one, what it defines, and which attributes its methods change."""

import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePath
from typing import Any

import numpy as np

from lightning_trak.fingerprints import bytecode

# These count as installed, wherever their files are.
_INSTALLED = sys.stdlib_module_names | {"torch", "lightning", "lightning_fabric", "pytorch_lightning", "torchmetrics"}

BUILTIN = (
    types.BuiltinFunctionType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.MethodDescriptorType,
    types.MethodWrapperType,
    types.WrapperDescriptorType,
    np.ufunc,
)
_DESCRIPTORS = (staticmethod, classmethod, property, functools.cached_property, functools.partialmethod)

# Methods that make an object, and methods that make texts for people.
INITIAL = frozenset(["__init__", "__new__", "__post_init__", "__setstate__"])
FOR_PEOPLE = frozenset(["__repr__", "__str__", "_repr_html_"])


def is_installed(module_name: str | None) -> bool:
    """Whether a Python module belongs to Python or an installed package, and not to the user or to this package."""
    package = (module_name or "").partition(".")[0]
    if package in ("lightning_trak", "__main__"):
        return False
    file = getattr(sys.modules.get(module_name or ""), "__file__", None) or ""
    return package in _INSTALLED or not {"site-packages", "dist-packages"}.isdisjoint(PurePath(file).parts)


def name_of(value: Any) -> str:
    """The name of a function or class. The user's own have no module name, since a script's may change."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None) or type(value).__qualname__
    users = module is None or not (is_installed(module) or module.partition(".")[0] == "lightning_trak")
    return str(name) if users else f"{module}.{name}"


def own_classes(cls: type) -> list[type]:
    """A class and its bases, without the classes of installed packages."""
    return [base for base in cls.__mro__ if not is_installed(base.__module__)]


def functions_of(value: Any) -> list[Any]:
    """The functions in an entry of a class, such as a method or a property."""
    if isinstance(value, _DESCRIPTORS):
        inner = (getattr(value, name, None) for name in ("__func__", "fget", "fset", "func"))
        return [function for function in inner if callable(function)]
    return [value] if isinstance(inspect.unwrap(value) if callable(value) else value, types.FunctionType) else []


def attributes_of(cls: type) -> dict[str, Any]:
    """Attributes of a class and its bases that are not plain methods.

    Some methods count as attributes: functions from other places, and methods that a decorator of an installed package
    has wrapped.
    """
    held: dict[str, Any] = {}
    for base in reversed(own_classes(cls)):
        for name, value in vars(base).items():
            functions = functions_of(value)
            if functions and name not in FOR_PEOPLE:
                if not all(_is_method(function, f"{name_of(base)}.{name}") for function in functions):
                    held[name] = functions
            elif not (functions or name.startswith(("__", "_abc_")) or isinstance(value, BUILTIN)):
                held[name] = value
    return held


def _is_method(function: Any, name: str) -> bool:
    plain = isinstance(function, types.FunctionType) and not is_installed(function.__globals__.get("__name__"))
    return plain and name_of(function) == name


def codes_of(cls: type, wanted: Callable[[str], bool]) -> Iterator[types.CodeType]:
    """The code of methods with wanted names, of a class and its bases, without decorators."""
    for base in own_classes(cls):
        yield from _codes_in(base, wanted)


def library_bases(cls: type, without: type) -> list[type]:
    """Classes of installed packages among a class and its bases, without the class ``without`` and its bases."""
    return [base for base in cls.__mro__ if is_installed(base.__module__) and base not in without.__mro__]


def library_codes_of(cls: type, wanted: Callable[[str], bool], without: type) -> Iterator[types.CodeType]:
    """The code of methods with wanted names in :func:`library_bases`."""
    for base in library_bases(cls, without):
        yield from _codes_in(base, wanted)


def _codes_in(base: type, wanted: Callable[[str], bool]) -> Iterator[types.CodeType]:
    for name, value in vars(base).items():
        if wanted(name):
            for function in map(inspect.unwrap, functions_of(value)):
                if isinstance(function, types.FunctionType):
                    yield function.__code__


def changed_by(cls: type, wanted: Callable[[str], bool]) -> set[str]:
    """Attributes of ``self`` that methods with wanted names assign or change in place."""
    return changed_in(codes_of(cls, wanted), "self")


def changed_in(codes: Iterable[types.CodeType], whose: str) -> set[str]:
    """Names of one kind that code changes, see :func:`~lightning_trak.fingerprints.bytecode.changes`."""
    return {name for code in codes for name, kind in bytecode.changes(code) if kind == whose}


def changed_by_use(cls: type, called: frozenset[str] = frozenset()) -> set[str]:
    """Attributes that change when an object is used, such as counters and caches. They are no part of its identity.

    A method counts as used if it is in ``called``, or if Python or another method calls it. It does not count if only
    the user calls it.
    """
    spoken = called.union(*map(bytecode.names, codes_of(cls, lambda name: name not in INITIAL)))
    return changed_by(cls, lambda name: name not in INITIAL and (name.startswith("__") or name in spoken))
