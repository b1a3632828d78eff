"""The registry of parts that models are made of."""

from collections.abc import Callable
from enum import IntEnum

from torch import nn

WIDTH, VOCABULARY, CLASSES, LONGEST = 4, 7, 3, 5


class Level(IntEnum):
    """What the package owes a model that has this part."""

    PLAIN = 0  # every engine gets it right
    ODD = 1  # engine="auto" and engine="loop" get it right; the others may refuse
    WILD = 2  # right, or refused


PARTS: dict[str, type[nn.Module]] = {}


def part(takes: str, level: Level = Level.PLAIN) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Register a class by its name, with the kinds of input that it takes."""

    def register(cls: type[nn.Module]) -> type[nn.Module]:
        cls.takes, cls.level = takes.split(), level
        PARTS[cls.__name__] = cls
        return cls

    return register


def names(takes: str, limit: Level) -> list[str]:
    """Parts for a kind of input, the plainest first, up to a level."""
    fitting = [name for name, cls in PARTS.items() if takes in cls.takes and cls.level <= limit]
    return sorted(fitting, key=lambda name: PARTS[name].level)
