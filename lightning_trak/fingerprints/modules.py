"""Modules in JSON's types: the code and options of each part. Weights are left out, since checkpoints hold them."""

from __future__ import annotations

import functools
import json
import re
import types
from collections.abc import Iterator
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
    classes = {type(part): None for part in parts.values()}
    called = [code for cls in classes for code in codes_of(cls, lambda name: name not in INITIAL)]
    spoken = _HOOKS.union({"forward"}, *map(bytecode.names, called))

    def is_any(_: str) -> bool:
        return True

    def is_used(name: str) -> bool:
        return name not in INITIAL and (name in spoken or name.startswith("__"))

    def matters(name: str) -> bool:
        if training:
            return True
        return name not in INITIAL and (name not in _FOR_TRAINING or name in fingerprint.names)

    changed = {
        cls: changed_by(cls, is_used)
        | changed_in(called, "other")
        | changed_in(library_codes_of(cls, {"forward"}.__contains__, *both(L.LightningModule)), "self")
        for cls in classes
    }
    set_by_own = {cls: changed_by(cls, is_any) | attributes_of(cls).keys() for cls in classes}
    read_by_library = {
        cls: frozenset().union(*map(bytecode.names, library_codes_of(cls, is_used, *both(L.LightningModule))))
        for cls in classes
    }

    has_library = {cls: any(library_bases(cls, *both(L.LightningModule))) for cls in classes}
    # Classes that read attributes by computed names, such as f"layer_{i}".
    by_any_name = {
        cls: any("getattr" in bytecode.names(code) for code in codes_of(cls, lambda name: name not in INITIAL))
        for cls in classes
    }

    def options_of(part: nn.Module) -> dict[str, Any]:
        cls = type(part)
        held = attributes_of(cls) | {name: value for name, value in vars(part).items() if name not in _HOUSEKEEPING}
        options = {}
        for name, value in held.items():
            set_by_own_alone = name in set_by_own[cls] and name not in read_by_library[cls]
            read = name in fingerprint.names or _is_functions(value) or (by_any_name[cls] and name in set_by_own[cls])
            public = has_library[cls] and not (name.startswith("_") or set_by_own_alone) and _is_option(value)
            if (read or public) and matters(name) and name not in changed[cls]:
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

    before = fingerprint.places, fingerprint.storages
    fingerprint.places = before[0] | {id(part): f"module {name}" for name, part in parts.items()}
    tensors = [tensor for kind in (module.parameters(), module.buffers()) for tensor in kind]
    fingerprint.storages = before[1] | {address(tensor) for tensor in tensors} - {0}
    try:
        count = -1
        while count != len(fingerprint.names):  # the code that was found may read more names
            count = len(fingerprint.names)
            for cls in classes:
                fingerprint.methods(cls, matters)
            entries = {name: {"class": _class_name(part), **options_of(part)} for name, part in parts.items()}
            fingerprint.read()
    finally:
        fingerprint.places, fingerprint.storages = before
    return _grouped(entries) if len(entries) > _MANY else entries


def _parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Submodules with their names, each once. Wrappers are skipped, and metrics too: no output depends on metrics."""
    seen: set[int] = set()

    def walk(part: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        inner = next((child for key, child in part.named_children() if key in WRAPPERS), None)
        if inner is not None:
            yield from walk(inner, name)
        elif id(part) not in seen and not isinstance(part, (Metric, MetricCollection)):
            seen.add(id(part))
            yield name, part
            for child_name, child in part.named_children():
                yield from walk(child, f"{name}.{child_name}" if name else child_name)

    yield from walk(module, "")


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
