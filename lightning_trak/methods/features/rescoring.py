"""The second stage: exact scores of a few candidates for each target, from the training data themselves."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_trak.features.checks.same_function import output_tolerance
from lightning_trak.features.rows import Features
from lightning_trak.features.store import FeatureStore
from lightning_trak.methods.examples import Examples
from lightning_trak.methods.influence.audit import audit
from lightning_trak.methods.influence.base import target_blocks, target_gradients
from lightning_trak.methods.influence.conjugate_gradient import ConjugateGradient
from lightning_trak.methods.influence.hessian import Hessian
from lightning_trak.methods.influence.mixed_hessian import MixedHessian
from lightning_trak.methods.influence.passes import Passes
from lightning_trak.methods.influence.products import gradient_products
from lightning_trak.methods.influence.solvers import InverseProduct
from lightning_trak.methods.questions import Question
from lightning_trak.methods.stored_data import require_stored_data
from lightning_trak.outputs import ModelOutput
from lightning_trak.scoring.damping import Damping
from lightning_trak.scoring.groups import Sums
from lightning_trak.scoring.newton.gram import Curvature
from lightning_trak.scoring.newton.per_prediction import WHOLE
from lightning_trak.scoring.newton.temperature import Tempered
from lightning_trak.scoring.newton.trak import LossGradients, TRAKScorer
from lightning_trak.scoring.topk import BothEnds, TopK, all_indices

_SOLVER = ConjugateGradient(max_iterations=1000, preconditioner="landmarks", strict=True)


@dataclass(frozen=True)
class ExactScores:
    """TRAK's scores without a projection: tau(x)_i = 1/M sum_m g_m(x)^T (G_m + lambda_m I)^-1 g_m(i) Q_m(i).

    g is the whole gradient of the output, and G_m = sum_j R_m(j) g_m(j) g_m(j)^T over all training examples, or a mean
    of this matrix and that of single predictions, see :mod:`lightning_trak.scoring.newton.per_prediction`. The inverse
    is applied to the gradients of targets by conjugate gradients, in float32, or in float64 with
    ``precision="64-true"``; see :class:`~lightning_trak.methods.influence.ConjugateGradient`.

    lambda is that of the stored features: with k of them, a damping that is a number is a share of trace / k. A
    projection keeps the trace, and the same share of trace / p, with p parameters, would be a smaller lambda.

    Attributes:
        curvature: as for :class:`~lightning_trak.scoring.newton.trak.TRAKScorer`, and so are the others.
        damping: lambda.
        loss_gradients: how Q is averaged.
        soft_threshold: by how much scores move towards zero.
        tempered: what gives Q; None: the loss does.
        curved: the output whose gradients make the matrix of single predictions; None: G_m is the first matrix alone.
    """

    curvature: Curvature
    damping: Damping
    loss_gradients: LossGradients
    soft_threshold: float
    tempered: Tempered | None = None
    curved: ModelOutput | None = None


@dataclass(frozen=True)
class SecondStage:
    """Scores candidates exactly, and keeps the best. Each process does all of it.

    Attributes:
        exact: what the scores are.
        train: the training data.
        top_k: how many candidates to keep for each target.
    """

    exact: ExactScores
    train: Examples
    top_k: int

    def require_possible(self, store: FeatureStore, num_parameters: int, question: Question) -> None:
        """Check what can be checked before long work.

        Raises:
            ValueError: if the data are not those of the store (their number and eight items are compared), if items
                change from one read to the next, or if the matrix is singular.
        """
        if question.get("train_groups") is not None:
            raise ValueError(
                "rescore scores a few training examples exactly, and a group's sum needs all of its own: leave"
                " train_groups out, or use attribute(..., train_groups=) of InfluenceFunction"
            )
        if self.exact.soft_threshold and question.get("aggregate") is not None:
            raise ValueError(
                "rescore adds the gradients of targets up, but scores that soft_threshold moves towards zero are no"
                " sums: leave aggregate out, or take soft_threshold=0"
            )
        if store.skipped:
            raise ValueError(
                f'rescore passes over all training data, but store "{store.directory}" has left out'
                f" {len(store.skipped)} examples whose gradients are not finite: score without rescore, or take these"
                " examples out of the data"
            )
        require_stored_data(self.train.loader, store, "rescore")
        if self.exact.damping == 0 and store.num_examples < num_parameters:
            raise ValueError(
                f"rescore needs damping here: with damping=0, the matrix of {store.num_examples} gradients of"
                f" {num_parameters} parameters is singular; use damping='auto'"
            )

    def best(
        self,
        passes: Passes,
        scorer: TRAKScorer,
        targets: Sequence[Examples],
        candidates: Sequence[TopK | BothEnds],
        largest: bool | None,
        sums: Sequence[Sums | None],
        output: ModelOutput | None,
    ) -> list[TopK | BothEnds]:
        """The best of the candidates by their exact scores.

        Args:
            passes: a copy of the model, and the training data.
            scorer: what found the candidates.
            targets: sets of targets.
            candidates: for each set, the training examples to score for each target.
            largest: whether to keep the highest scores or the lowest; None: both.
            sums: for each set, how targets are added up; None: each has a row.
            output: the output of the targets; None: that of the training examples.

        Returns:
            For each set, exact scores and positions, best first. Equal scores are in the order of positions.

        Raises:
            ValueError: if a training example has another output than in the store, or conjugate gradients do not
                converge.
        """
        found = [_Candidates(each, passes.dtype) for each in candidates]
        store, noise = scorer.store, scorer.noise
        passes.begun_with = store.begun_with
        tempered = None if self.exact.tempered is None else self.exact.tempered.settled(noise)

        def loss_gradients(rows: Features) -> Tensor:
            return rows.loss_gradients if tempered is None else tempered.loss_gradients(rows.outputs)

        for checkpoint in range(store.num_checkpoints):
            passes.enter(checkpoint)
            if noise is not None:
                passes.noise_level = noise.agreement**2 * noise.factors[checkpoint]
            audit(passes, self.train)
            with passes.asking(output):
                for examples in targets:
                    audit(passes, examples)
            inverse = self._inverse(passes, scorer, checkpoint)
            for examples, each, rows in zip(targets, found, sums, strict=True):
                for block in target_blocks(passes, examples, rows):
                    directions = inverse(target_gradients(passes, examples, block, output), block.span)
                    each.add(block.span, passes, directions, self.exact.loss_gradients, loss_gradients)
        return [self._kept(each, store.num_checkpoints, largest) for each in found]

    def _inverse(self, passes: Passes, scorer: TRAKScorer, checkpoint: int) -> InverseProduct:
        """What multiplies gradients by (G_m + lambda_m I)^-1, at the checkpoint that the passes have entered."""
        damping, dim = self.exact.damping, scorer.num_features
        if damping != "auto":
            damping *= passes.size / dim  # from a share of trace / k to one of trace / p
        hessian = Hessian(passes, self.exact.curvature, damping, _same_outputs(scorer.store, passes, checkpoint))
        if self.exact.curved is not None and scorer.curved is not None:
            single = passes.over(self.train.numbered(), self.exact.curved)
            audit(single, single.train)
            check = _same_outputs(scorer.curved, single, checkpoint)
            level = 1.0 if scorer.noise is None else scorer.noise.levels(weighted=True)[checkpoint]
            hessian = MixedHessian(Hessian(single, "gauss_newton", 0.0, check), hessian, WHOLE, damping, level)
        return _SOLVER.prepare(hessian)

    def _kept(self, found: "_Candidates", num_checkpoints: int, largest: bool | None) -> TopK | BothEnds:
        scores = found.products / num_checkpoints
        if self.exact.loss_gradients == "averaged":
            scores *= found.loss_gradients / num_checkpoints
        if self.exact.soft_threshold:
            scores = torch.nn.functional.softshrink(scores, self.exact.soft_threshold)
        if largest is None:
            return BothEnds(self._end(found, scores, True), self._end(found, scores, False))
        return self._end(found, scores, largest)

    def _end(self, found: "_Candidates", scores: Tensor, largest: bool) -> TopK:
        last = scores.masked_fill(found.repeated, -torch.inf if largest else torch.inf)
        order = last.sort(dim=1, descending=largest, stable=True).indices[:, : min(self.top_k, found.kept)]
        return TopK(scores.gather(1, order), found.indices.gather(1, order))


class _Candidates:
    """The candidates of a set of targets, in the order of positions, and the sums of their scores over checkpoints.

    Attributes:
        indices: positions in the training set, shape ``(num_targets, num_candidates)``.
        repeated: bool of the same shape: whether the candidate is the one before it, because both ends name it.
        kept: the number of candidates at one end.
        products: sums of products of gradients, times Q unless it is averaged separately, of the same shape.
        loss_gradients: sums of Q, of the same shape.
    """

    def __init__(self, best: TopK | BothEnds, dtype: torch.dtype) -> None:
        self.kept = best.indices.shape[1]
        indices = all_indices(best)
        self.indices = indices.sort(dim=1).values
        self.repeated = torch.zeros_like(indices, dtype=torch.bool)
        self.repeated[:, 1:] = self.indices.diff(dim=1) == 0
        self.products = torch.zeros(indices.shape, dtype=dtype)
        self.loss_gradients = torch.zeros(indices.shape, dtype=dtype)

    def add(
        self,
        span: range,
        passes: Passes,
        directions: Tensor,
        averaging: LossGradients,
        q: Callable[[Features], Tensor],
    ) -> None:
        """Add the scores of some targets' candidates at the current checkpoint.

        Args:
            span: the targets.
            passes: the model there.
            directions: of the targets, shape ``(len(span), p)``.
            averaging: how Q is averaged.
            q: gives Q of some examples, shape ``(n,)``.
        """
        rows = slice(span.start, span.stop)
        sums, loss_gradients = self.products[rows].view(-1), self.loss_gradients[rows].view(-1)
        union, numbers = torch.unique(self.indices[rows], return_inverse=True)
        numbers, entries = numbers.flatten().sort()  # which candidate each entry is, and where it stands
        start = 0
        for part, products in gradient_products(passes, directions, union.tolist()):
            low, high = torch.searchsorted(numbers, torch.tensor([start, start + len(part)])).tolist()
            places, those = numbers[low:high] - start, entries[low:high]
            own = q(products).to(sums)[places]
            found = products.features.cpu()[places, those // self.indices.shape[1]]
            sums[those] += found * own if averaging == "per_checkpoint" else found
            loss_gradients[those] += own
            start += len(part)


def _same_outputs(store: FeatureStore, passes: Passes, checkpoint: int) -> Callable[[Sequence[int], Features], None]:
    """A check that training examples have their stored outputs at the current checkpoint."""
    stored = torch.cat([store.read(checkpoint, shard).outputs for shard in range(store.num_shards)])
    tolerance = output_tolerance(store)

    def check(positions: Sequence[int], rows: Features) -> None:
        kept, outputs = stored[torch.tensor(positions)].double(), rows.outputs.cpu().double()
        wrong = ~torch.isclose(outputs, kept, rtol=tolerance, atol=tolerance)
        if wrong.any():
            first = int(wrong.nonzero()[0])
            raise ValueError(
                f"the output of training example {positions[first]} at {passes.where} is {float(kept[first]):.6g} in"
                f' store "{store.directory}", and {float(outputs[first]):.6g} now: rescore needs the data and the'
                " model that the store was made of"
            )

    return check
