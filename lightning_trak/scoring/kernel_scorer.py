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
        """n, the number of training examples."""
        return self.curved.num_examples

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
        """Inner products of the features of all training examples: float64, shape ``(n, n)``, on the CPU."""

        def make() -> dict[str, Tensor]:
            return {"kernel": kernel_matrix(self.curved, checkpoint, self._device, ranks).cpu()}

        return self._kept(checkpoint, "kernel", "", ranks, make)["kernel"]

    def _curvatures(self, checkpoint: int) -> Tensor:
        """R of all training examples, or ones; 0 for those that the model has not seen. float64, shape ``(n,)``."""
        shards = (self.curved.read_stored(checkpoint, shard).curvatures for shard in range(self.curved.num_shards))
        curvatures = torch.cat(list(shards)).double()
        if self.curvature == "identity":
            curvatures = torch.ones_like(curvatures)
        require_convex(curvatures, 'curvature="identity"')
        return self._where_seen(checkpoint, curvatures)

    def _residuals(self, checkpoint: int) -> Tensor:
        """Q of all training examples; 0 for those that the model has not seen. float64, shape ``(n,)``."""
        shards = (self.curved.read_stored(checkpoint, shard).loss_gradients for shard in range(self.curved.num_shards))
        return self._where_seen(checkpoint, torch.cat(list(shards)).double())

    def _where_seen(self, checkpoint: int, values: Tensor) -> Tensor:
        subset = self.subsets[checkpoint]
        return values if subset is None else values * subset.mask
