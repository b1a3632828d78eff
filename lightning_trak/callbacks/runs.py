"""Which runs a Lightning checkpoint continues, by the states that callbacks have left in it."""

from typing import Any


def runs_in(checkpoint: dict[str, Any], kind: str) -> list[str]:
    """The runs of all callbacks of a kind.

    Args:
        checkpoint: a Lightning checkpoint.
        kind: the start of their state keys.
    """
    states = checkpoint.get("callbacks", {})
    return [state["run"] for key, state in states.items() if key.startswith(kind) and "run" in state]
