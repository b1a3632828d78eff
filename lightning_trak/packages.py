"""The two packages of PyTorch Lightning: ``lightning`` and ``pytorch_lightning``.

Both hold the same code, ``lightning.pytorch`` in one and ``pytorch_lightning`` in the other, and so do
``lightning.fabric`` and ``lightning_fabric``. But their classes are not the same objects, so ``isinstance`` tells them
apart. Users have either. This package imports ``lightning``, and asks the questions below instead of ``isinstance``,
which also find the classes of ``pytorch_lightning`` once the user has imported it.
"""

import sys
from typing import Any, TypeGuard, TypeVar

from lightning.pytorch.utilities.model_helpers import is_overridden

T = TypeVar("T")

_TWINS = {"lightning.pytorch": "pytorch_lightning", "lightning.fabric": "lightning_fabric"}


def both(kind: type[T]) -> tuple[type[T], ...]:
    """A class of ``lightning``, and its twin in ``pytorch_lightning`` if the user has imported that package."""
    for package, twin in _TWINS.items():
        if kind.__module__.startswith(package):
            module = sys.modules.get(kind.__module__.replace(package, twin, 1))
            found = getattr(module, kind.__name__, None)
            return (kind,) if found is None else (kind, found)
    return (kind,)


def is_a(value: object, *kinds: type[T]) -> TypeGuard[T]:
    """Whether a value is an instance of one of these classes of ``lightning``, or of one of their twins."""
    return any(isinstance(value, twin) for kind in kinds for twin in both(kind))


def own(kind: type[T], value: object) -> type[T]:
    """Of a class of ``lightning`` and its twin, the one that is in the package of a value's class."""
    packages = {base.__module__.partition(".")[0] for base in type(value).__mro__}
    return kind if packages.isdisjoint(_TWINS.values()) else both(kind)[-1]


def overrides(value: Any, method: str, kind: type) -> bool:
    """Whether a value has a method of its own in place of that of its Lightning class.

    Args:
        value: an instance of ``kind`` or of its twin.
        method: the name of the method.
        kind: a class of ``lightning``, such as ``LightningModule``.
    """
    return bool(is_overridden(method, value, own(kind, value)))
