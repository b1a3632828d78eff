"""Values, functions and classes in JSON's types: equal ones are equal in every process, and different ones differ.

For functions and classes of the user and of this package, their code counts, and everything that it refers to. For
those of installed packages, only the name counts. Otherwise, every upgrade would make every store useless.
"""

from __future__ import annotations

import copyreg
import enum
import functools
import hashlib
import json
import math
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import PurePath
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning_utilities.core.rank_zero import WarningCache
from torch import Tensor, nn

from lightning_trak.compatibility import original_function, registered
from lightning_trak.fingerprints import bytecode
from lightning_trak.fingerprints.classes import (
    BUILTIN,
    FOR_PEOPLE,
    INITIAL,
    attributes_of,
    changed_by_use,
    changed_in,
    codes_of,
    functions_of,
    is_installed,
    name_of,
    own_classes,
)
from lightning_trak.packages import is_a
from lightning_trak.storage.files import tensor_digest
from lightning_trak.storage.schemas import json_digest

# Installed packages whose objects are values. Objects of other packages may hold clocks, paths and counters, which
# differ in the next process. For these, only the class counts, unless the value has an owner.
_VALUES = (
    *("argparse", "collections", "copyreg", "datetime", "decimal", "fractions", "functools", "numpy", "operator"),
    *("re", "scipy", "torch.distributions", "types"),
)


def digest(content: Any) -> str:
    """A short digest of content in JSON's types."""
    return json_digest(content)[:16]


class Fingerprint:
    """Walks through values and collects the code that they refer to.

    Each function and class has one entry of its own. So a message can name the place of a change, and cycles end.
    Functions and classes with the same name share an entry.

    Args:
        describe_module: describes the parts of a module. It uses this walk for the values in them.

    Attributes:
        names: names that the code so far may read of other objects.
        places: id of an object that needs no description -> its name.
        storages: addresses of tensors that need no description.
    """

    def __init__(self, describe_module: Callable[[nn.Module, Fingerprint], Any]) -> None:
        self._describe_module = describe_module
        self.names: set[str] = set()
        self.places: dict[int, str] = {}
        self.storages: set[int] = set()
        self._weights = True
        self._found: dict[str, list[Any]] = {}
        self._alive: dict[int, Any] = {}  # by id: objects with an entry, so that no other object gets the same id
        self._queue: list[tuple[str, Callable[[Any], Any], Any]] = []
        self._open: set[int] = set()

    def read(self) -> None:
        """Read the code that was found, and everything that it refers to."""
        while self._queue:
            label, describe, value = self._queue.pop(0)
            self._found[label].append(describe(value))

    def code(self) -> dict[str, str]:
        """Digests of the code that was found, by the names of functions and classes."""
        self.read()
        if not self._found:
            return {}
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        return {"python": version, **{label: digest(found) for label, found in sorted(self._found.items())}}

    def value(self, value: Any, owner: str | None = None) -> Any:
        """A value in JSON's types.

        Args:
            value: the value.
            owner: the name of the object that holds the value, for errors. Without an owner, only the class counts for
                an object that cannot be described, and for objects of installed packages that are not values.

        Raises:
            TypeError: if there is an owner, and the value is or holds an object that cannot be described, such as a
                lock or a file.
        """
        described = plain(value)
        if described is not NotImplemented:
            return described
        if id(value) in self.places:
            return self.places[id(value)]
        if id(value) in self._open:
            return "itself"
        self._open.add(id(value))
        try:
            return self._deep(value, owner)
        finally:
            self._open.discard(id(value))

    def _deep(self, value: Any, owner: str | None) -> Any:
        value = original_function(value)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, np.ndarray):
            content = value.tolist() if value.dtype.hasobject else hashlib.sha256(value.tobytes()).hexdigest()[:16]
            return [str(value.dtype), list(value.shape), self.value(content, owner)]
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, enum.Enum):
            return [name_of(type(value)), value.name, self.value(value.value, owner)]
        if isinstance(value, type):
            return self._class_name(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return [self.value(value.__func__), self._bound_to(value.__self__, owner)]
        if isinstance(value, BUILTIN):
            held = getattr(value, "__self__", None)
            named = held is None or isinstance(held, (type, types.ModuleType))
            return name_of(value) if named else [name_of(value), self.value(held, owner)]
        if isinstance(value, functools.partial):
            return ["partial", *(self.value(part, owner) for part in (value.func, value.args, value.keywords))]
        if isinstance(value, Mapping):
            return {_key(self.value(key, owner)): self.value(item, owner) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.value(item, owner) for item in value]
        if isinstance(value, WarningCache):  # what has been said so far changes no number
            return name_of(type(value))
        if isinstance(value, (set, frozenset)):
            return sorted((self.value(item, owner) for item in value), key=_key)
        if isinstance(value, types.ModuleType):
            return value.__name__
        if isinstance(value, torch.Generator):
            return ["torch.Generator", value.initial_seed()]
        if isinstance(value, torch.jit.ScriptFunction):
            return digest(value.code)
        if isinstance(getattr(value, "__wrapped__", None), types.FunctionType):  # functools.lru_cache
            return [name_of(type(value)), self.value(value.__wrapped__)]
        return self._object(value, owner)

    def _tensor(self, tensor: Tensor) -> Any:
        described = [str(tensor.dtype), list(tensor.shape)]
        known = tensor.is_meta or (tensor.requires_grad and bool(self.storages)) or address(tensor) in self.storages
        return described if known else [*described, tensor_digest({"": tensor})[:16]]

    def _module(self, module: nn.Module) -> Any:
        """A module, by its class, options, code and weights."""
        weights = tensor_digest(dict(_tensors(module)))[:16] if self._weights else ""
        return [name_of(type(module)), digest(self._describe_module(module, self)), weights]

    def _bound_to(self, value: Any, owner: str | None) -> Any:
        """The object that a method is bound to. Weights of a LightningModule are left out: checkpoints hold them."""
        before, self._weights = self._weights, self._weights and not is_a(value, L.LightningModule)
        try:
            return self.value(value, owner)
        finally:
            self._weights = before

    def _object(self, value: Any, owner: str | None) -> Any:
        """An object, by what pickle would save."""
        cls = type(value)
        closed = owner is None and is_installed(cls.__module__) and not cls.__module__.startswith(_VALUES)
        if closed or is_a(value, L.Trainer):
            return name_of(cls)
        try:
            reduced = copyreg.dispatch_table[cls](value) if cls in copyreg.dispatch_table else value.__reduce_ex__(4)
        except Exception as error:
            if owner is None:
                return self._instance_of(cls)
            raise TypeError(
                f"{owner} is or holds a {cls.__name__}, which cannot be compared between runs"
                f" ({error}); expected values, functions, modules and objects that can be pickled"
            ) from error
        name, own = self._instance_of(cls)
        if isinstance(reduced, str):  # its name in its module
            return {"class": name, "named": reduced}
        make, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
        skipped = changed_by_use(cls)
        found = {
            "own": own,
            "made by": None if make.__module__ == "copyreg" else self.value(make, owner),
            "arguments": [self.value(argument, owner) for argument in arguments if argument is not cls],
            "state": self.value(_without(state, skipped), owner),
            "items": [self.value(item, owner) for item in items or ()],
            "pairs": [[self.value(key, owner), self.value(item, owner)] for key, item in pairs or ()],
        }
        return {"class": name, **{key: content for key, content in found.items() if content not in (None, [], {})}}

    def methods(self, cls: type, wanted: Callable[[str], bool]) -> str:
        """Collect the methods with wanted names of a class and its bases. Returns the name of the class."""
        for base in own_classes(cls):
            for name, value in vars(base).items():
                if wanted(name) and name not in FOR_PEOPLE:
                    for function in functions_of(value):
                        self.value(function)
        return name_of(cls)

    def _instance_of(self, cls: type) -> list[Any]:
        """The class of an object: its name, its attributes, and its methods, without those that made the object."""
        # Code may also change attributes of a class through the name of the class.
        changed = changed_by_use(cls) | changed_in(codes_of(cls, lambda name: name not in INITIAL), "other")
        held = {name: self.value(value) for name, value in attributes_of(cls).items() if name not in changed}
        return [self.methods(cls, lambda name: name not in INITIAL), held]

    def _class_name(self, cls: type) -> str:
        """A class itself, by its name. If it is not of an installed package, everything that it defines counts, too."""
        if is_installed(cls.__module__):
            return name_of(cls)
        label = f"class {name_of(cls)}"
        self._note(label, self._class, cls)
        return label

    def _class(self, cls: type) -> Any:
        self.methods(cls, INITIAL.__contains__)
        return [self._instance_of(cls), [self.value(base) for base in cls.__bases__]]

    def _note(self, label: str, describe: Callable[[Any], Any], value: Any) -> None:
        if id(value) not in self._alive:
            self._alive[id(value)] = value
            self._found.setdefault(label, [])
            self._queue.append((label, describe, value))

    def _function(self, function: types.FunctionType) -> Any:
        module = function.__globals__.get("__name__")
        if is_installed(module):
            # It may be a decorator, such as torch.no_grad, around a function of the user.
            name, cells = f"{module}.{function.__code__.co_name}", _cells(function)
            return [name, {cell: self.value(value) for cell, value in cells.items()}] if cells else name
        self._note(name_of(function), self._content, function)
        return name_of(function)

    def _content(self, function: types.FunctionType) -> Any:
        """A function, by its code, its defaults, and what its code refers to."""
        code = function.__code__
        self.names |= bytecode.names(code)
        scope = {**function.__globals__, **_cells(function)}
        changed = changed_in([code], "scope") | {"__class__"}
        references = [(name, path) for name, path in bytecode.references(code) if name in scope and name not in changed]
        return [
            bytecode.code_digest(code),
            self.value(function.__defaults__),
            self.value(function.__kwdefaults__),
            {".".join((name, *path)): self._referred(scope[name], path) for name, path in references},
        ]

    def _referred(self, value: Any, path: tuple[str, ...]) -> Any:
        """The value at the end of a path of attributes.

        If an attribute is a method or a property, the object that has it is described instead.
        """
        for number, name in enumerate(path):
            if isinstance(value, types.ModuleType):
                if is_installed(value.__name__):
                    return ".".join((value.__name__, *path[number:]))
                value = getattr(value, name, None)
            elif name in (held := _attributes(value)):
                value = held[name]
            else:  # a method or property, which may use anything of the object
                return self._bound_to(value, None)
        return self.value(value)


def address(tensor: Tensor) -> int:
    """The address of a tensor's memory; 0 if it has no memory of its own."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # sparse, fake and the like
        return 0


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def plain(value: Any) -> Any:
    """A simple value in JSON's types; NotImplemented if the value is not simple."""
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else repr(value)
    if kind in (complex, range, torch.dtype, torch.device, torch.layout, torch.memory_format, type(...)):
        return repr(value)
    if kind in (bytes, bytearray):
        return hashlib.sha256(value).hexdigest()[:16]
    if isinstance(value, np.generic) and not value.dtype.hasobject:
        return [str(value.dtype), repr(value.item())]
    if isinstance(value, np.dtype):
        return str(value)
    return value.as_posix() if isinstance(value, PurePath) else NotImplemented


def _key(described: Any) -> str:
    return described if isinstance(described, str) else json.dumps(described, sort_keys=True)


def _without(state: Any, names: set[str]) -> Any:
    """An object's state without some of its attributes."""
    if isinstance(state, tuple):  # the object has slots
        return [_without(part, names) for part in state]
    return {name: value for name, value in state.items() if name not in names} if isinstance(state, dict) else state


def _cells(function: types.FunctionType) -> dict[str, Any]:
    """The variables of enclosing functions that a function holds."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # not assigned yet
            found[name] = cell.cell_contents
    return found


def _attributes(value: Any) -> dict[str, Any]:
    """The attributes that an object itself holds."""
    if isinstance(value, type):
        return {}
    held = dict(getattr(value, "__dict__", {}))
    if isinstance(value, nn.Module):
        held |= registered(value)
    if is_a(value, L.LightningModule):
        held["hparams"] = value.hparams
    return {**value, **held} if isinstance(value, dict) else held
