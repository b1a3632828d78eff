"""How brittle predictions are: how far outputs fall, and how many predictions flip, without their proponents."""

from dataclasses import dataclass

from torch import Tensor

from lightning_trak.retraining.estimates import Estimate, mean_of, proportion_of
from lightning_trak.texts.tables import Cell, Table


@dataclass(frozen=True)
class Brittleness:
    """Outputs of models trained without the proponents of a target, and of models trained on everything.

    Attributes:
        methods: names of the methods.
        ks: how many proponents were removed, ascending.
        outputs: ``(num_methods, num_ks, num_targets, num_seeds)``.
        references: of models trained on everything, ``(num_targets, num_references, num_seeds)``.
        threshold: a prediction is right while the output, averaged over seeds, is above it. For a
            :class:`~lightning_trak.outputs.ClassificationMargin`, above 0 is a probability of the label above 1/2; of
            more than two classes the label may be the most probable one with less. To count by that, give
            :class:`Counterfactuals` an output of your own, such as the label's logit minus the largest other one.
    """

    methods: tuple[str, ...]
    ks: tuple[int, ...]
    outputs: Tensor
    references: Tensor
    threshold: float = 0.0

    @property
    def drops(self) -> Tensor:
        """The mean output of all references minus that without proponents, float64 ``(methods, ks, targets)``."""
        return self.references.double().mean((1, 2)) - self.outputs.double().mean(3)

    def drop(self, confidence: float = 0.95, num_bootstraps: int = 2000, seed: int = 0) -> Estimate:
        """Mean drop over targets, in units of the output.

        Its interval is a percentile bootstrap over targets (Efron and Tibshirani 1993, chapter 13), the same draws for
        every method and k. Compare each drop with that of ``"random"`` scores.

        Args:
            confidence: of the interval, in (0, 1).
            num_bootstraps: replicates.
            seed: of the replicates; the global random state is neither read nor changed.

        Returns:
            Shapes ``(num_methods, num_ks)``.
        """
        return mean_of(self.drops, confidence, num_bootstraps, seed)

    @property
    def counted(self) -> Tensor:
        """Targets whose predictions can flip, since the references are right about them: bool ``(num_targets,)``."""
        return self.references.double().mean((1, 2)) > self.threshold

    def flips(self, confidence: float = 0.95) -> Estimate:
        """The fraction of predictions that flip, of those that can (:attr:`counted`); NaN if none can.

        Its interval is Wilson's for a proportion (Wilson 1927, Journal of the American Statistical Association 22).

        Returns:
            Shapes ``(num_methods, num_ks)``.
        """
        flipped = self.outputs.double().mean(3)[..., self.counted] <= self.threshold
        return proportion_of(flipped.sum(-1), flipped.shape[-1], confidence)

    def noise_flips(self, confidence: float = 0.95) -> Estimate:
        """The fraction of predictions that flip when nothing is removed and models are only trained again.

        Each reference is compared with the mean of the others. The interval counts each target once, not once for each
        reference, since references agree on most targets.

        Returns:
            Scalars.
        """
        means = self.references.double().mean(2)
        count = means.shape[1]
        others = (means.sum(1, keepdim=True) - means) / (count - 1)
        counted = others > self.threshold
        flipped = counted & (means <= self.threshold)
        return proportion_of(flipped.sum() / count, counted.sum() / count, confidence)

    def metrics(self) -> dict[str, float]:
        """Everything as numbers by name, such as ``TRAK/drop_40``, ``TRAK/drop_40_low`` and ``TRAK/flips_40``."""
        found = {"noise/flips": float(self.noise_flips().mean)}
        for kind, estimate in (("drop", self.drop()), ("flips", self.flips())):
            for row, method in enumerate(self.methods):
                for column, k in enumerate(self.ks):
                    for end, values in zip(("", "_low", "_high"), estimate, strict=True):
                        found[f"{method}/{kind}_{k}{end}"] = float(values[row, column])
        return found

    def table(self) -> Table:
        """A row for each method and k, with the intervals."""
        drop, flips = self.drop(), self.flips()
        rows: list[tuple[Cell, ...]] = []
        for row, method in enumerate(self.methods):
            for column, k in enumerate(self.ks):
                fall, share = drop.written(".2f", row, column), flips.written(".0%", row, column)
                rows.append((method, k, fall, share))
        rows.append(("trained again on everything", 0, "0", self.noise_flips().written(".0%")))
        return Table(("method", "removed", "output falls by", "predictions that flip"), rows)
