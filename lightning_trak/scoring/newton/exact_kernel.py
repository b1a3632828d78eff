"""TRAK's scores from the inner products of exact gradients.

The kernel, the inner products of all pairs of training examples, is made in blocks of rows up to the diagonal. Each is
a file of the store with a checksum, is there or not, and is made once: to continue is to list those that are missing.
"""

import random
from collections.abc import Iterator
from functools import cached_property

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_trak.features.store import FeatureStore
from lightning_trak.gradients.hooks.factors import GradientForms
from lightning_trak.running.ranks import Ranks
from lightning_trak.scoring.base import full_precision, with_float64
from lightning_trak.scoring.newton.dual import DualScorer
from lightning_trak.scoring.newton.gram import shard_blocks
from lightning_trak.scoring.newton.inner_products import inner_products

_FORMAT = 1  # of a block
_AUDITED = 2  # inner products of each pair of blocks are computed again from whole gradients


class ExactKernelScorer(DualScorer):
    """:class:`~lightning_trak.scoring.DualScorer` of a store that holds exact gradients in their shortest form."""

    user = "ExactKernel"

    @property
    def linear(self) -> bool:
        """Never: what is stored of a gradient are its factors, and those of a sum are not their sums."""
        return False

    @cached_property
    def num_features(self) -> int:
        """The number of elements of a gradient."""
        return sum(form.rows * form.columns for form, _ in stored_forms(self.store, 0))

    @cached_property
    def _blocks(self) -> list[tuple[int, range]]:
        """Shards whose inner products are made together, and the number of their source."""
        return [
            (number, shards)
            for number, (source, _) in enumerate(self.sources)
            for shards in shard_blocks(source.num_shards, source.shard_size)
        ]

    def make_kernels(self, device: torch.device, ranks: Ranks) -> None:
        """Make the missing blocks of all kernels. Ranks share them.

        Args:
            device: where the products are computed.
            ranks: the processes that share the work; all must call this.

        Raises:
            RuntimeError: if the store is incomplete, or an inner product is wrong.
            OSError: if a block cannot be written. Those before it are kept.
        """
        for source, _ in self.sources:
            source.require_complete()
        self._device = with_float64(device)
        keys = {(c, block): self._key(c, block) for c in self.store.first for block in range(len(self._blocks))}
        missing = [
            (checkpoint, block)
            for checkpoint, block in sorted(keys, key=lambda place: (place[0], -place[1]))  # the longest first
            if self._source(block).read_extra(checkpoint, _name(block), keys[checkpoint, block]) is None
        ]
        missing = ranks.gather(missing)[0]  # a rank may see files that others have just written
        if missing:
            rank_zero_info(f"{self.user}: {len(missing)} of {len(keys)} blocks of the kernel to do")
        with full_precision(self._device):
            for number in ranks.share(len(missing)):
                checkpoint, block = missing[number]
                rows = {"products": self._make_block(checkpoint, block).cpu()}
                self._source(block).write_extra(checkpoint, _name(block), rows, keys[checkpoint, block])
        ranks.barrier()

    def _key(self, checkpoint: int, block: int) -> str:
        """What the products of a block of examples and all before it are made from."""
        number, shards = self._blocks[block]
        before = [source.digest(checkpoint) for source, _ in self.sources[:number]]
        return ":".join([str(_FORMAT), *before, self._source(block).digest(checkpoint, shards.stop)])

    def _source(self, block: int) -> FeatureStore:
        return self.sources[self._blocks[block][0]][0]

    def _make_block(self, checkpoint: int, block: int) -> Tensor:
        """The inner products of a block's rows of the kernel and all rows up to its last: float64, ``(rows, last)``."""
        forms, mine = self._forms(checkpoint), self._stored(checkpoint, block)
        parts = []
        for other in range(block + 1):
            others = mine if other == block else self._stored(checkpoint, other)
            products = inner_products(forms, mine, others)
            self._audit(forms, (mine, others), products, f"{checkpoint}/{block}/{other}")
            parts.append(products)
        return torch.cat(parts, dim=1)

    def _audit(self, forms: GradientForms, stored: tuple[Tensor, Tensor], products: Tensor, key: str) -> None:
        """Compare some inner products with those of whole gradients, which were compared with plain autograd.

        Raises:
            RuntimeError: if they differ.
        """
        draw = random.Random(f"{self.store.key}/{key}")
        for _ in range(_AUDITED):
            i, j = (draw.randrange(len(part)) for part in stored)
            one, other = (forms.gradients(part[[k]]).double()[0] for part, k in zip(stored, (i, j), strict=True))
            expected, scale = float(one @ other), float(one.norm() * other.norm())
            if abs(float(products[i, j]) - expected) > 1e-6 * scale:
                raise RuntimeError(
                    f"an inner product of two gradients is {float(products[i, j]):.9g}, and {expected:.9g} by the"
                    " gradients themselves: the device computes wrong numbers; use another device"
                )

    def _stored(self, checkpoint: int, block: int) -> Tensor:
        source = self._source(block)
        shards = [source.read(checkpoint, shard).features for shard in self._blocks[block][1]]
        return torch.cat(shards).to(self._device)

    def _rows_of_blocks(self) -> Iterator[tuple[int, range]]:
        """The number of each block, and its rows of the kernel. The rows of a source stand together."""
        for block, (number, shards) in enumerate(self._blocks):
            source, start = self._source(block), number * self.store.num_examples
            yield block, range(start + source.shard(shards[0]).start, start + source.shard(shards[-1]).stop)

    def _kernel(self, checkpoint: int, ranks: Ranks) -> Tensor:
        """See DualScorer. It is put together from its blocks; those that are missing are made."""
        self.make_kernels(self._device, ranks)
        kernel = torch.empty(self.num_rows, self.num_rows, dtype=torch.float64)
        for block, rows in self._rows_of_blocks():
            stored = self._source(block).read_extra(checkpoint, _name(block), self._key(checkpoint, block))
            if stored is None:
                raise RuntimeError(f"block {block} of the kernel has disappeared; score again, which makes it again")
            kernel[rows.start : rows.stop, : rows.stop] = stored["products"]
            kernel[: rows.start, rows.start : rows.stop] = stored["products"][:, : rows.start].T
        return kernel

    def _products(self, checkpoint: int, targets: Tensor, ranks: Ranks) -> Tensor:
        """See DualScorer."""
        forms, found = self._forms(checkpoint), targets.new_zeros(len(targets), self.num_rows).double()
        rows_of = dict(self._rows_of_blocks())
        for block in ranks.share(len(rows_of)):
            rows = rows_of[block]
            found[:, rows.start : rows.stop] = inner_products(forms, targets, self._stored(checkpoint, block))
        return ranks.sum(found)

    def paired(self, checkpoint: int, first: Tensor, second: Tensor) -> Tensor:
        """See Scorer."""
        forms = self._forms(checkpoint)
        pairs = zip(torch.split(first, 1), torch.split(second, 1), strict=True)
        return torch.cat([inner_products(forms, *pair).flatten() for pair in pairs])

    def _products_between(self, checkpoint: int, targets: Tensor, others: Tensor) -> Tensor:
        """See DualScorer."""
        return inner_products(self._forms(checkpoint), targets, others)

    def _forms(self, checkpoint: int) -> GradientForms:
        """The forms of the gradients of all sources.

        Raises:
            RuntimeError: if a store has lost them, or they differ.
        """
        forms, *others = (stored_forms(source, checkpoint) for source, _ in self.sources)
        if any(list(other) != list(forms) for other in others):
            raise RuntimeError(
                f'store "{self.store.directory}" holds gradients in other forms than its curvature: call featurize with'
                " overwrite=True"
            )
        return forms


def stored_forms(store: FeatureStore, checkpoint: int) -> GradientForms:
    """The forms in which a store holds the gradients of a checkpoint.

    Raises:
        RuntimeError: if the store has lost them.
    """
    found = store.read_extra(checkpoint, "projection", store.key)
    if found is None:
        raise RuntimeError(
            f'store "{store.directory}" has lost the forms of the gradients of checkpoint {checkpoint}; call featurize'
            " again, which finds them again"
        )
    return GradientForms.from_tensors(found)


def _name(block: int) -> str:
    return f"kernel-{block:05d}"
