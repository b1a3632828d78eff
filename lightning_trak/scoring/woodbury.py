"""TRAK's scores from an n x n system, whose rows are not only those that are scored."""

import torch
from torch import Tensor

from lightning_trak.running.ranks import Ranks
from lightning_trak.scoring.kernel import products_with
from lightning_trak.scoring.kernel_scorer import KernelScorer


class WoodburyScorer(KernelScorer):
    """Factors the kernel of all rows that K_m is made of, and forms the direction of each target.

    A positive score says that training on i raises the output at x. With rows D, weighted by C, K_m = D^T C D, the
    direction is (phi(x) - D^T (D D^T + lambda_m C^-1)^-1 D phi(x)) / lambda_m (Woodbury 1950, Inverting modified
    matrices). The arguments are those of :class:`~lightning_trak.scoring.TRAKScorer`.
    """

    def precondition(self, checkpoint: int, features: Tensor) -> Tensor:
        """(K_m + lambda_m I)^-1 phi(x) of each target: shape ``(num_targets, k)``, in at least float32."""
        system, features = self._damped(checkpoint), self._working(features)
        rest = features.to(torch.float64, copy=True)
        products = [products_with(source, checkpoint, rest, Ranks()) for source, _ in self.sources]
        coefficients = system.coefficients(system.solve(torch.cat(products, dim=1)))
        start = 0
        for source, _ in self.sources:
            for shard in range(source.num_shards):
                rows = source.read_stored(checkpoint, shard).moved(lambda codes: codes.to(self._device))
                for part in rows.blocks():
                    stop = start + len(part.features)
                    rest -= coefficients[:, start:stop] @ part.features.double()
                    start = stop
        return (rest / system.ridge).to(features)
