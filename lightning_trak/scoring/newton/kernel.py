"""The kernel: inner products of all training examples, and its damped factor, which gives the scores of the dual.

With features Phi (n x k), K = Phi Phi^T, R on a diagonal and b = Phi phi(x), the push-through identity gives the scores
of all training examples at once:

    Phi (Phi^T R Phi + lambda I)^-1 phi(x) = (K R + lambda I)^-1 b = R^-1/2 (S + lambda I)^-1 R^1/2 b,
    S = R^1/2 K R^1/2.

The direction (Phi^T R Phi + lambda I)^-1 phi(x) is never formed. Its largest part, phi(x) / lambda outside the span of
the training features, has no inner product with any of them, and would only leave rounding errors in the scores.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_trak.features.rows import StoredFeatures
from lightning_trak.features.store import FeatureStore
from lightning_trak.running.ranks import Ranks
from lightning_trak.scoring.newton.gram import DampedGram

_STRIP_BYTES = 1 << 28  # of features of all examples, in float64
_STRIPS = 16  # at least this many for the ranks to share, if they are not too narrow
_LEAST_WIDTH = 64  # narrower strips would cost more in sums of n x n numbers than in products
_ROWS = 1024  # of the kernel, computed at a time


class DampedKernel:
    """Solves (K R + lambda I) tau = b in float64, where K holds the inner products of training examples.

    An example without curvature is scored, too: its score is the limit for small R. Cholesky's factor has R_i^1/2 as a
    factor of each element in row and column i outside the diagonal. So the solution has it with the same relative
    precision as the rest, and can be divided by it.

    Args:
        kernel: K, float64, shape ``(n, n)``, on the CPU.
        curvatures: R, at least 0, shape ``(n,)``.
        damping: lambda relative to the mean eigenvalue of Phi^T R Phi, which is its trace divided by ``dim``.
        dim: k, the number of features.
        precision: dtype of the features.
        name: what to call the matrix in errors.
        device: where systems are solved.

    Raises:
        ValueError: if S is zero, not finite, or singular to the precision of the features, or the damping is zero.
    """

    def __init__(
        self,
        kernel: Tensor,
        curvatures: Tensor,
        damping: float,
        dim: int,
        precision: torch.dtype,
        name: str,
        device: torch.device,
    ) -> None:
        if damping == 0:
            raise ValueError(
                f"the Gram matrix of {name} ({dim} x {dim}) is singular, because there are only {len(kernel)} training"
                " examples: use a larger damping (now 0; 'auto' suits most models), a projection with a smaller dim or"
                " more training examples"
            )
        curvatures = curvatures.to(device, torch.float64)
        # So small that nothing else changes: S has the square of this in units of its scale.
        self._roots = curvatures.clamp(min=1e-60 * curvatures.max()).sqrt()
        weighted = kernel.to(device) * self._roots
        weighted *= self._roots.unsqueeze(1)
        self._factor = DampedGram(weighted, damping, precision, name, dim)

    def effective_dimension(self) -> float:
        """As :meth:`~lightning_trak.scoring.newton.gram.DampedGram.effective_dimension`: K has the eigenvalues of S."""
        return self._factor.effective_dimension()

    def score_noise(self, error: float) -> float:
        """As :meth:`~lightning_trak.scoring.newton.gram.DampedGram.score_noise`: K has the eigenvalues of S."""
        return self._factor.score_noise(error)

    def mean_inverse(self) -> float:
        """As :meth:`~lightning_trak.scoring.newton.gram.DampedGram.mean_inverse`, of k eigenvalues."""
        return self._factor.mean_inverse()

    def squared_step(self, residuals: Tensor, kernel: Tensor) -> float:
        """How long the Newton step of residuals is: lambda |(Phi^T R Phi + lambda I)^-1 Phi^T residuals|^2.

        The step is Phi^T (residuals - R tau) / lambda, with tau its inner products with the features.

        Args:
            residuals: float64, shape ``(n,)``.
            kernel: as given at construction.
        """
        kernel, residuals = kernel.to(self._roots), residuals.to(self._roots)
        tau = self.solve((kernel @ residuals).unsqueeze(0)).squeeze(0)
        rest = residuals - self._roots.square() * tau
        return float(rest @ (kernel @ rest)) / self._factor.ridge

    def solve(self, products: Tensor) -> Tensor:
        """Solve for each target.

        Args:
            products: b of each target, float64, shape ``(num_targets, n)``.

        Returns:
            Shape ``(num_targets, n)``: scores, before they are multiplied by Q.
        """
        return self._factor.solve(products * self._roots).div_(self._roots)

    def outside(self, solved: Tensor, own: Tensor, products: Tensor) -> Tensor:
        """The solution at features that are not those of training examples.

        Phi d = tau gives d = (phi(x) - Phi^T R tau) / lambda, so that phi_i^T d needs inner products alone.

        Args:
            solved: tau of each target, from :meth:`solve`, shape ``(num_targets, n)``.
            own: inner products of the targets with these features, float64, shape ``(num_targets, m)``.
            products: inner products of these features with the training examples, float64, shape ``(m, n)``.

        Returns:
            Shape ``(num_targets, m)``.
        """
        return (own - (solved * self._roots.square()) @ products.T) / self._factor.ridge

    def own(self, products: Tensor, examples: range) -> Tensor:
        """The solution of each of some training examples at itself.

        Args:
            products: rows of K, shape ``(len(examples), n)``.
            examples: which rows.

        Returns:
            float64, shape ``(len(examples),)``.
        """
        return self.solve(products.to(self._roots))[:, examples.start : examples.stop].diagonal()


def kernel_matrix(stores: Sequence[FeatureStore], checkpoint: int, device: torch.device, ranks: Ranks) -> Tensor:
    """Inner products of the features of all training examples; of several stores, one after another.

    The features are read in strips of columns, whose products are summed in float64. A strip takes a quarter of a
    gibibyte, or 64 columns. So n x k numbers are never in memory. Ranks share the strips.

    Args:
        stores: complete features.
        checkpoint: which checkpoint.
        device: where the products are computed.
        ranks: the processes that share the work; all must call this.

    Returns:
        float64, shape ``(n, n)``.
    """
    n, k = sum(store.num_examples for store in stores), stores[0].read_stored(checkpoint, 0).k
    width = min(max(_LEAST_WIDTH, _STRIP_BYTES // (8 * n)), max(_LEAST_WIDTH, -(-k // _STRIPS)))
    starts = range(0, k, width + width % 2)
    total = torch.zeros(n, n, dtype=torch.float64, device=device)
    blocks = [slice(start, min(start + _ROWS, n)) for start in range(0, n, _ROWS)]
    for number in ranks.share(len(starts)):
        columns = range(starts[number], min(starts[number] + starts.step, k))
        strip = torch.cat(
            [part.decode_columns(columns).to(device, torch.float64) for part in _rows(stores, checkpoint)]
        )
        for rows in blocks:  # the lower triangle
            total[rows, : rows.stop].addmm_(strip[rows], strip[: rows.stop].T)
    for rows in blocks:
        total[: rows.start, rows] = total[rows, : rows.start].T
    return ranks.sum(total)


def products_with(store: FeatureStore, checkpoint: int, targets: Tensor, ranks: Ranks) -> Tensor:
    """Inner products of targets with all training examples, in float64, in one pass over the store.

    Args:
        store: complete features.
        checkpoint: which checkpoint.
        targets: features of targets, shape ``(num_targets, k)``.
        ranks: the processes that share the work; all must call this with the same targets.

    Returns:
        float64, shape ``(num_targets, n)``, on the targets' device.
    """
    k = targets.shape[1]
    found = torch.zeros(len(targets), store.num_examples, dtype=torch.float64, device=targets.device)
    for shard in ranks.share(store.num_shards):
        examples, features = store.shard(shard), store.read(checkpoint, shard).features.to(targets.device)
        width = max(_LEAST_WIDTH, _STRIP_BYTES // (8 * max(len(features), len(targets))))
        mine = found[:, examples.start : examples.stop]
        for start in range(0, k, width):
            columns = slice(start, start + width)
            mine.addmm_(targets[:, columns].double(), features[:, columns].double().T)
    return ranks.sum(found)


def _rows(stores: Sequence[FeatureStore], checkpoint: int) -> Iterator[StoredFeatures]:
    return (store.read_stored(checkpoint, shard) for store in stores for shard in range(store.num_shards))
