"""Modules in JSON's types: the code and options of each part. Weights are left out, since checkpoints hold them."""

from __future__ import annotations

import functools
import json
import re
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning as L
from torch import nn
from torch.fx import GraphModule
from torch.jit import ScriptModule
from torchmetrics import Metric, MetricCollection

from lightning_trak.compatibility import WRAPPERS, hooks_of
from lightning_trak.fingerprints import bytecode
from lightning_trak.fingerprints.classes import (
    INITIAL,
    attributes_of,
    changed_by,
    changed_in,
    codes_of,
    is_installed,
    library_bases,
    library_codes_of,
    name_of,
)
from lightning_trak.fingerprints.values import Fingerprint, address, digest, plain
from lightning_trak.packages import both, is_a

# Methods that Lightning calls for training and logging. Features depend on the other methods of LightningModule.
_HOOKS = frozenset(name for name in dir(L.LightningModule) if name not in dir(nn.Module))
_FOR_TRAINING = (_HOOKS | {"configure_model_output"}) - {
    "configure_model",
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_after_batch_transfer",
}
# Attributes of every module, and attributes that transformers sets itself.
_HOUSEKEEPING = frozenset([*vars(nn.Module()), *vars(L.LightningModule()), *vars(nn.Module)]) - {"forward"} | {
    "gradient_checkpointing",
    "name_or_path",
    "warnings_issued",
}

# If a module has more parts than this, layers share an entry if their names differ only by numbers.
_MANY = 100


def new_fingerprint() -> Fingerprint:
    """A new walk through values and code."""
    return Fingerprint(describe)


def describe(module: nn.Module, fingerprint: Fingerprint, training: bool = False) -> dict[str, Any]:
    """The parts of a module, each with its class and options. The code is added to the fingerprint.

    An option is an attribute that the user's code reads, or a public attribute of a library's class. An attribute that
    changes when the module is used is not an option. Methods and attributes that only training uses are left out.

    Args:
        module: any module.
        fingerprint: collects the code. It also knows the names that other code reads of the module.
        training: whether methods and attributes of training count, too.

    Returns:
        Descriptions of the parts, by name.
    """
    parts = dict(_parts(module))
    classes = _read_classes(parts.values())

    def matters(name: str) -> bool:
        if training:
            return True
        return name not in INITIAL and (name not in _FOR_TRAINING or name in fingerprint.names)

    with _described(fingerprint, module, parts):
        count = -1
        while count != len(fingerprint.names):  # the code that was found may read more names
            count = len(fingerprint.names)
            for cls in classes:
                fingerprint.methods(cls, matters)
            entries = {
                name: {"class": _class_name(part), **_options(part, classes[type(part)], fingerprint, matters)}
                for name, part in parts.items()
            }
            fingerprint.read()
    return _grouped(entries) if len(entries) > _MANY else entries


@contextmanager
def _described(fingerprint: Fingerprint, module: nn.Module, parts: dict[str, nn.Module]) -> Iterator[None]:
    """Inside this context, a value that is a part or a tensor of the module is only named."""
    before = fingerprint.places, fingerprint.storages
    fingerprint.places = before[0] | {id(part): f"module {name}" for name, part in parts.items()}
    tensors = [tensor for kind in (module.parameters(), module.buffers()) for tensor in kind]
    fingerprint.storages = before[1] | {address(tensor) for tensor in tensors} - {0}
    try:
        yield
    finally:
        fingerprint.places, fingerprint.storages = before


@dataclass(frozen=True)
class _Class:
    """What the code of a class says about the attributes of its modules.

    Attributes:
        attributes: those of the class itself.
        changed: names of those that change when a module is used.
        set_by_own: names of those that the user's code sets.
        read_by_library: names that code of libraries, other than Lightning's, reads.
        has_library: whether there is such code.
        by_any_name: whether the user's code reads attributes by computed names, such as ``f"layer_{i}"``.
    """

    attributes: dict[str, Any]
    changed: set[str]
    set_by_own: set[str]
    read_by_library: frozenset[str]
    has_library: bool
    by_any_name: bool


def _read_classes(parts: Iterable[nn.Module]) -> dict[type, _Class]:
    """Read the code of the classes of a module's parts. Code of one part may change another one."""
    classes, lightning = list(dict.fromkeys(map(type, parts))), both(L.LightningModule)
    called = {cls: list(codes_of(cls, lambda name: name not in INITIAL)) for cls in classes}
    all_called = [code for codes in called.values() for code in codes]
    spoken = _HOOKS.union({"forward"}, *map(bytecode.names, all_called))
    changed_by_others = changed_in(all_called, "other")

    def is_any(_: str) -> bool:
        return True

    def is_used(name: str) -> bool:
        return name not in INITIAL and (name in spoken or name.startswith("__"))

    def read(cls: type) -> _Class:
        attributes = attributes_of(cls)
        forward = library_codes_of(cls, {"forward"}.__contains__, *lightning)
        used = library_codes_of(cls, is_used, *lightning)
        return _Class(
            attributes,
            changed=changed_by(cls, is_used) | changed_by_others | changed_in(forward, "self"),
            set_by_own=changed_by(cls, is_any) | attributes.keys(),
            read_by_library=frozenset().union(*map(bytecode.names, used)),
            has_library=any(library_bases(cls, *lightning)),
            by_any_name=any("getattr" in bytecode.names(code) for code in called[cls]),
        )

    return {cls: read(cls) for cls in classes}


def _options(part: nn.Module, cls: _Class, fingerprint: Fingerprint, matters: Callable[[str], bool]) -> dict[str, Any]:
    """The options of one part, see :func:`describe`."""
    held = cls.attributes | {name: value for name, value in vars(part).items() if name not in _HOUSEKEEPING}
    options = {}
    for name, value in held.items():
        set_by_own_alone = name in cls.set_by_own and name not in cls.read_by_library
        read = name in fingerprint.names or _is_functions(value) or (cls.by_any_name and name in cls.set_by_own)
        public = cls.has_library and not (name.startswith("_") or set_by_own_alone) and _is_option(value)
        if (read or public) and matters(name) and name not in cls.changed:
            options[name] = _short(fingerprint.value(value))
    if is_a(part, L.LightningModule) and "hparams" in fingerprint.names:
        for name in fingerprint.names.intersection(part.hparams):
            options[f"hparams.{name}"] = _short(fingerprint.value(part.hparams[name]))
    for kind, hooks in hooks_of(part).items():
        users = [hook for hook in hooks if _is_users(hook)]
        if users:
            options[kind] = _short(fingerprint.value(users))
    if isinstance(part, (GraphModule, ScriptModule)):
        options["program"] = digest(str(part.code))
    return options


def _parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Submodules with their names, each once. Wrappers are skipped, and metrics too: no output depends on metrics."""
    yield from _parts_at(module, "", set())


def _parts_at(part: nn.Module, name: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    inner = next((child for key, child in part.named_children() if key in WRAPPERS), None)
    if inner is not None:
        yield from _parts_at(inner, name, seen)
    elif id(part) not in seen and not isinstance(part, (Metric, MetricCollection)):
        seen.add(id(part))
        yield name, part
        for child_name, child in part.named_children():
            yield from _parts_at(child, f"{name}.{child_name}" if name else child_name, seen)


def _class_name(part: nn.Module) -> str:
    """The name of the class, or of the user's class if FSDP2 has replaced it."""
    made = (base for base in type(part).__mro__ if not (base.__name__[:4] == "FSDP" and is_installed(base.__module__)))
    return name_of(next(made))


def _is_option(value: Any) -> bool:
    """Whether a public attribute of a library's module is a setting of its computation, not a cache or other object."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_option, value))
    functions = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)
    return plain(value) is not NotImplemented or isinstance(value, functions)


def _is_functions(entry: Any) -> bool:
    """Whether an attribute is a list of functions that stands for a method."""
    return isinstance(entry, list) and bool(entry) and all(map(callable, entry))


def _is_users(hook: Any) -> bool:
    """Whether a hook is the user's, and not one of a library or of this package."""
    function = getattr(hook, "__func__", getattr(hook, "func", hook))
    module = getattr(function, "__module__", None) or type(function).__module__
    return not is_installed(module) and module.partition(".")[0] != "lightning_trak"


def _short(value: Any) -> Any:
    return value if len(json.dumps(value)) <= 60 else digest(value)


def _grouped(entries: dict[str, Any]) -> dict[str, Any]:
    """Put layers into one group if their names differ only by numbers."""
    groups: dict[str, list[Any]] = {}
    for name, entry in entries.items():
        groups.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", name), []).append([name, entry])
    return {
        pattern: {"parts": len(group)}
        | (group[0][1] if all(entry == group[0][1] for _, entry in group) else {"in order": digest(group)})
        for pattern, group in groups.items()
    }
