"""Before which steps the recording of a run keeps a full state."""

import math
from typing import Any, Literal

from lightning_trak.checks import positive

Spacing = Literal["sqrt", "log"] | int


def check_spacing(spacing: Any) -> Spacing:
    """A spacing of full states, checked.

    Raises:
        ValueError: if it is neither ``"sqrt"`` nor ``"log"`` nor a positive integer.
    """
    if spacing in ("sqrt", "log"):
        return spacing  # type: ignore[no-any-return]
    if isinstance(spacing, str):
        raise ValueError(f'spacing must be "sqrt", "log" or a positive integer, got {spacing!r}')
    return positive("spacing", spacing)


def keeps_state(step: int, spacing: Spacing) -> bool:
    """Whether a full state is kept before a step.

    With ``"sqrt"`` at the squares, so that T steps have sqrt(T) states at most 2 sqrt(T) steps apart, whatever T will
    be; with ``"log"`` at the powers of two; with a number n before every n-th step.
    """
    if spacing == "sqrt":
        return math.isqrt(step) ** 2 == step
    if spacing == "log":
        return step & (step - 1) == 0
    return step % int(spacing) == 0
