"""How many examples of a batch are worked on at a time."""


def examples_at_once(available: int, needed: int) -> int:
    """The number of examples that fit in memory: a power of two, so that threads have equal shares; at least 1.

    Args:
        available: bytes.
        needed: bytes of an example.
    """
    fitting = max(1, available // max(1, needed))
    return 1 << (fitting.bit_length() - 1)
