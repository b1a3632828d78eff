"""The system with a row for each training example: what scorers share that factor it."""

from typing import cast

import torch
from torch import Tensor

from lightning_trak.running.ranks import Ranks
from lightning_trak.scoring.gram import require_convex
from lightning_trak.scoring.kernel import DampedKernel, kernel_matrix
from lightning_trak.scoring.trak import TRAKScorer
from lightning_trak.scoring.undamped import Undamped


class KernelScorer(TRAKScorer):
    """Factors the kernel of the training examples; ``kernel.py`` has the formulas. The damping must be more than 0."""

    @property
    def num_rows(self) -> int:
        """n, the number of training examples, for each source of K."""
        return sum(source.num_examples for source, _ in self.sources)

    def _damped(self, checkpoint: int) -> DampedKernel:
        return cast(DampedKernel, self._system(checkpoint)[0])

    def _undamped(self, checkpoint: int, ranks: Ranks) -> Undamped[DampedKernel]:
        kernel, curvatures = self._kernel(checkpoint, ranks), self._curvatures(checkpoint)
        weights, about = curvatures * kernel.diagonal(), self._about(checkpoint)

        def factor(damping: float) -> DampedKernel:
            return DampedKernel(kernel, curvatures, damping, self.num_features, *about, self._device)

        def residual_step(system: DampedKernel) -> tuple[float, float]:
            residuals = self._residuals(checkpoint)
            return system.squared_step(residuals, kernel), float(residuals.square() @ kernel.diagonal())

        return Undamped(weights.sum(), weights.square().sum(), factor, residual_step)

    def _kernel(self, checkpoint: int, ranks: Ranks) -> Tensor:
        """Inner products of the features of all rows of K: float64, shape ``(n, n)``, on the CPU."""
        *others, last = (source for source, _ in self.sources)
        about = "".join(f":{other.digest(checkpoint)}" for other in others)

        def make() -> dict[str, Tensor]:
            return {"kernel": kernel_matrix([*others, last], checkpoint, self._device, ranks).cpu()}

        return self._kept(last, checkpoint, "kernel", about, ranks, make)["kernel"]

    def _curvatures(self, checkpoint: int) -> Tensor:
        """R of all rows of K, or ones, times the share of their source; 0 for examples that the model has not seen.

        Returns:
            float64, shape ``(n,)``.
        """
        found = []
        for source, share in self.sources:
            shards = (source.read_stored(checkpoint, shard).curvatures for shard in range(source.num_shards))
            curvatures = torch.cat(list(shards)).double()
            if self.curvature == "identity":
                curvatures = torch.ones_like(curvatures)
            require_convex(curvatures, 'curvature="identity"')
            found.append(share * self._where_seen(checkpoint, curvatures))
        return torch.cat(found)

    def _residuals(self, checkpoint: int) -> Tensor:
        """Q of all training examples; 0 for those that the model has not seen. float64, shape ``(n,)``."""
        shards = (self.store.read_stored(checkpoint, shard).loss_gradients for shard in range(self.store.num_shards))
        return self._where_seen(checkpoint, torch.cat(list(shards)).double())

    def _where_seen(self, checkpoint: int, values: Tensor) -> Tensor:
        subset = self.subsets[checkpoint]
        return values if subset is None else values * subset.mask
