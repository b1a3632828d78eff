"""Attribution methods beside TRAK, all with the interface of `Method`."""

from lightning_trak.methods.base import Method

__all__ = ["Method"]
