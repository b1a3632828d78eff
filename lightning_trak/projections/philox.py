"""Counter-based random numbers: every word depends only on its stream, row and block.

Philox4x32-10 is by Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). It has no
state. So any part of a random matrix can be generated on any device, in any order, with the same bits.
"""

from __future__ import annotations

import hashlib
import json
import operator
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
# Counters in one pass. On a CPU, the operands of all rounds should stay in cache. Elsewhere, few kernels are better.
_CPU_COUNTERS = 1 << 14
_ACCELERATOR_COUNTERS = 1 << 20
SIGNS = 128  # in a block of four words

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Encrypt counters with ten rounds of Philox4x32.

    Args:
        counter: four int64 tensors that broadcast together, each with values in [0, 2^32).
        key: two words in [0, 2^32).

    Returns:
        Four int64 tensors of the broadcast shape, each with values uniform over [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # An int64 product that wraps around holds all 64 bits of a product of two uint32. The shift extends the sign of
        # the upper half, and the lower half still has the upper one above it. Both are masked before the next product.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((product1 >> 32) ^ c1).bitwise_xor_(k0).bitwise_and_(_MASK)
        c2 = ((product0 >> 32) ^ c3).bitwise_xor_(k1).bitwise_and_(_MASK)
        c1, c3 = product1, product0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1 & _MASK, c2, c3 & _MASK


@dataclass(frozen=True)
class Stream:
    """One of 2^96 streams of random words. A stream is a table of 2^64 rows by 2^32 blocks of four words.

    Use :meth:`Stream.derive` to make one. Equal streams give equal words on every device.

    Args:
        key: the Philox key.
        tag: the counter word that no row or block index uses.
    """

    key: tuple[int, int]
    tag: int

    @classmethod
    def derive(cls, purpose: str, seed: int, checkpoint: int, name: str) -> Stream:
        """Derive a stream from its identity: 96 bits of the SHA-256 digest.

        Seeds are not added or multiplied, since streams of neighbouring seeds could then be equal. Among 10^9 streams,
        the probability that two are equal is below 10^-11.

        Args:
            purpose: what the words are used for, such as the kind of projection.
            seed: any non-negative integer.
            checkpoint: a number of the checkpoint.
            name: name of the parameter.

        Returns:
            The stream of this identity.

        Raises:
            ValueError: if ``seed`` or ``checkpoint`` is negative.
        """
        for label, value in (("seed", seed), ("checkpoint", checkpoint)):
            if value < 0:
                raise ValueError(f"Expected `{label}` to be a non-negative integer but got {value}.")
        # JSON keeps the fields apart: ("a", 11, 2) and ("a1", 1, 2) are different texts.
        identity = json.dumps([purpose, operator.index(seed), operator.index(checkpoint), name])
        key0, key1, tag = struct.unpack("<3I", hashlib.sha256(identity.encode()).digest()[:12])
        return cls((key0, key1), tag)

    def words(self, rows: Tensor, blocks: int) -> Tensor:
        """Random words for some rows.

        Args:
            rows: row indices, int64 of shape (rows,).
            blocks: number of blocks of each row, from the first one.

        Returns:
            Words uniform over [0, 2^32), int64 of shape (rows, blocks, 4), on the device of ``rows``.
        """
        columns = torch.arange(blocks, dtype=torch.int64, device=rows.device)
        tag = torch.full((), self.tag, dtype=torch.int64, device=rows.device)
        counters = _CPU_COUNTERS if rows.device.type == "cpu" else _ACCELERATOR_COUNTERS
        passes = [
            torch.stack(philox4x32((part & _MASK, part >> 32, columns, tag), self.key), dim=-1)
            for part in torch.split(rows.unsqueeze(1), max(1, counters // blocks))
        ]
        return torch.cat(passes)

    def signs(self, elements: range, device: torch.device) -> Tensor:
        """Random signs of some elements. Element i uses bit i mod 128 of the first block of row i div 128.

        Args:
            elements: consecutive indices.
            device: where the signs are made.

        Returns:
            int8 of shape (elements,).
        """
        first = elements.start // SIGNS
        rows = torch.arange(first, -(-elements.stop // SIGNS), device=device)
        skipped = elements.start - first * SIGNS
        return signs(self.words(rows, 1).flatten(1), torch.int8).flatten()[skipped : skipped + len(elements)]


def signs(words: Tensor, dtype: torch.dtype) -> Tensor:
    """The bits of random words as signs: -1 where a bit is set and 1 elsewhere, from the lowest bit on.

    Args:
        words: values in [0, 2^32), int64 of shape (rows, words).
        dtype: the dtype of the signs.

    Returns:
        Shape (rows, 32 * words).
    """
    # A table look-up for each byte writes each sign once. Bit shifts would take several passes.
    octets = (words.unsqueeze(-1) >> torch.arange(0, 32, 8, device=words.device)).bitwise_and_(0xFF)
    bits = torch.arange(256, device=words.device).unsqueeze(1) >> torch.arange(8, device=words.device) & 1
    return (1 - 2 * bits).to(dtype)[octets].flatten(1)
