"""Parts of a fleet, for processes that share its members."""

from lightning_trak.retraining.members import Member

Part = str | tuple[int, int]


def share(members: list[Member], part: Part | None) -> list[Member]:
    """Every n-th member, so that any number of finished parts is spread over the fleet.

    Args:
        members: all members.
        part: ``"3/16"`` or ``(3, 16)``: the third of sixteen parts; None: all of them.

    Raises:
        ValueError: if there is no such part.
    """
    if part is None:
        return members
    try:
        number, count = map(int, part.split("/") if isinstance(part, str) else part)
    except (ValueError, TypeError):
        number, count = 0, 0
    if not 1 <= number <= count:
        raise ValueError(f'part must be "i/n" or (i, n) with 1 <= i <= n, got {part!r}')
    return members[number - 1 :: count]
