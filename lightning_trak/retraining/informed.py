"""Scores that learn from retrained models: what members of a fleet say beyond the prediction of the scores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_trak.checks import require_tensor
from lightning_trak.metrics import LinearDatamodelingScore

_MIN_MEMBERS = 5  # with fewer, nothing can be held out to choose the noise
_FOLDS = 5
_NOISES = (math.inf, 100.0, 30.0, 10.0, 3.0, 1.0)  # ratios of noise to prior variance
_SHARED = 0.1  # share of the prior variance that all targets have in common
_TOGETHER = 0.5  # share of the noise that comes as the residuals of targets do together
_CAUTION = 0.5  # standard errors that the gain of a correction counts less
_MAX_STEPS = 100  # of conjugate gradients
_TOLERANCE = 1e-3  # relative norm of what they leave: the noise of the outputs is far larger


def informed_scores(scores: Tensor, masks: Tensor, outputs: Tensor) -> Tensor:
    """Correct scores by what retrained models say beyond the prediction of the scores.

    The scores of a subset's examples add up to a prediction of the output of a model trained on this subset. Where
    some models have been trained, the outputs differ from the predictions, and the differences say something about the
    scores, if little: there are many more examples than models. So the correction is small where a score is small::

        output(x, S) = a sum_{i in S} (tau_i(x) + delta_i(x)) + b(x) + noise
        delta_i(x) = s_i(x) eta_i(x),   s_i(x) = sign(tau_i(x)) |tau_i(x)|^(3/4) c(x)

    with independent eta_i(x) of variance 1, of which a tenth is common to all targets: an example that counts for more
    than its score says at one target often does so at others. c(x) gives corrections of target x the same total
    variance as its scores.

    A model that is surer than others is so at many targets, so the noise of targets goes together: half of its
    variance has the covariance that the residuals have between targets, and half is each target's own. Without that, a
    few directions in which all outputs move would pass for what examples do.

    The result is the mean of tau + delta given the outputs: kernel ridge regression of the residuals, or a Gaussian
    process, with all targets at once, by conjugate gradients. The ratio of noise to prior variance is chosen by
    cross-validation over the models, for all targets together, by the errors relative to the noise. If no correction
    predicts left-out models better than the scores alone, by more than half a standard error, the scores stay as they
    are.

    The scores of any method can be corrected, if they predict the outputs to some degree. The corrected scores know how
    these models came out, so measure them on others: :class:`~lightning_trak.LinearDatamodelingScore` takes these
    ``masks`` as ``used_masks``.

    Args:
        scores: ``(num_targets, num_train)``; positive says that training on the example raises the output.
        masks: bool ``(num_subsets, num_train)``, at least 5 different subsets, true where the subset holds the example.
        outputs: ``(num_targets, num_subsets)``, outputs of the models that were trained on the subsets; or
            ``(num_targets, num_subsets, num_seeds)``, which are averaged over seeds.

    Returns:
        ``(num_targets, num_train)``, in the unit, sign and dtype of ``scores``.

    Raises:
        TypeError: if the scores are not a tensor.
        ValueError: if a shape, dtype or device does not fit, a number is NaN or infinite, there are too few subsets, or
            the predictions of the scores do not rise with the outputs.

    Example::

        fleet = read_fleet("run/fleet")  # 100 subsets
        scores = informed_scores(scores, fleet.masks[:50], fleet.outputs[:, :50])
        lds = LinearDatamodelingScore(fleet.masks[50:], used_masks=fleet.masks[:50])
        lds.update(scores, fleet.outputs[:, 50:])
    """
    require_tensor("scores", scores)
    if not scores.is_floating_point():
        raise ValueError(f"expected scores of a floating-point dtype, got {scores.dtype}")
    known = LinearDatamodelingScore(masks).to(masks.device)
    known.update(scores, outputs)  # checks shapes, devices and numbers
    observed = known.outputs[0]
    if len(masks) < _MIN_MEMBERS or not len(scores):
        raise ValueError(
            f"expected at least one target, and at least {_MIN_MEMBERS} subsets to learn from, got scores of shape"
            f" {tuple(scores.shape)} and masks of shape {tuple(masks.shape)}"
        )
    unit = scores.detach().double().abs().max()  # so that no square overflows
    tau, members = scores.detach().double() / torch.where(unit > 0, unit, 1), masks.double()
    scale = _scale(tau, members, observed)
    noise = _best_noise(tau, members, observed, scale)
    (correction,) = _Regression(tau, members, observed, scale).corrections([noise])
    return ((tau + correction) * unit).to(scores.dtype)


def _scale(tau: Tensor, masks: Tensor, outputs: Tensor) -> Tensor:
    """How much the outputs change for a change of 1 in the predictions: one number for all targets.

    Raises:
        ValueError: if the predictions of the scores do not rise with the outputs.
    """
    centred, predicted = _centred(outputs), tau @ (masks - masks.mean(0)).T
    weights = _precisions(centred)
    covariance = (weights * centred * predicted).sum()
    if not covariance > 0:
        raise ValueError(
            "the sums of scores over subsets do not rise with the outputs of the models trained on them, so there is"
            " nothing to correct: check the sign of the scores, and that examples, targets and subsets are in the same"
            " order in all arguments"
        )
    return covariance / (weights * predicted.square()).sum()


def _centred(outputs: Tensor) -> Tensor:
    """Outputs minus the mean of their target; exactly 0 where all are the same, whose mean may be rounded."""
    offsets = outputs - outputs[:, :1]
    return offsets - offsets.mean(1, keepdim=True)


def _precisions(centred: Tensor) -> Tensor:
    """One over the variance of each target's outputs; 0 where all are the same, which says nothing."""
    variances = centred.square().mean(1, keepdim=True)
    return torch.where(variances > 0, 1 / variances, 0.0)


def _best_noise(tau: Tensor, masks: Tensor, outputs: Tensor, scale: Tensor) -> float:
    """The ratio of noise to prior variance whose corrections predict left-out models best.

    Errors e of a model count as e^T C^-1 e, with the noise's covariance C between targets. The gain over no correction
    counts less half a standard error over models.
    """
    errors = torch.zeros(len(_NOISES), len(masks), dtype=torch.float64, device=masks.device)
    spread = _centred(outputs).var(1, keepdim=True)
    varying = spread > 0
    for fold in range(_FOLDS):
        left_out = torch.arange(len(masks), device=masks.device) % _FOLDS == fold
        regression = _Regression(tau, masks[~left_out], outputs[:, ~left_out], scale)
        for number, correction in enumerate(regression.corrections(_NOISES)):
            missed = outputs[:, left_out] - regression.predict(tau + correction, masks[left_out])
            relative = torch.where(varying, missed / spread.sqrt(), 0.0)
            errors[number, left_out] = (relative * regression.without_noise(relative)).sum(0)
    gains = errors[:1] - errors
    return _NOISES[int((gains.mean(1) - _CAUTION * gains.std(1) / len(masks) ** 0.5).argmax())]


class _Regression:
    """Regresses the outputs of some models on the subsets that they were trained on.

    Args:
        tau: scores, float64 ``(num_targets, num_train)``.
        masks: 0 or 1, float64 ``(num_models, num_train)``.
        outputs: float64 ``(num_targets, num_models)``.
        scale: of the outputs, in units of the predictions.
    """

    def __init__(self, tau: Tensor, masks: Tensor, outputs: Tensor, scale: Tensor) -> None:
        self._mean_mask, self._mean_output = masks.mean(0), outputs.mean(1, keepdim=True)
        self._masks, centred = masks - self._mean_mask, _centred(outputs)
        self._scale, weights = scale, _precisions(centred)
        self._residuals = weights.sqrt() * (centred / scale - tau @ self._masks.T)
        size = tau.abs() ** 1.5
        total = size.sum(1, keepdim=True)
        prior = size * (tau.square().sum(1, keepdim=True) / torch.where(total > 0, total, 1))
        self._deviations = tau.sign() * prior.sqrt()
        whitened = self._deviations.square() * weights
        # In units of the mean prior variance of a residual, so that the noise is a plain ratio.
        self._unit = (whitened @ self._masks.square().T).mean()
        self._roots = self._deviations * weights.sqrt() / self._unit.sqrt()
        squares = self._residuals.square().sum()
        # Columns whose outer products add up to the residuals' covariance between targets, with mean variance 1.
        self._factors = self._residuals * (len(tau) / torch.where(squares > 0, squares, 1)).sqrt()

    def predict(self, scores: Tensor, masks: Tensor) -> Tensor:
        """The outputs of models of other subsets, ``(num_targets, num_models)``."""
        return self._mean_output + self._scale * (scores @ (masks - self._mean_mask).T)

    def without_noise(self, values: Tensor) -> Tensor:
        """The inverse of the noise's covariance between targets times ``(num_targets, any)`` numbers.

        With F for the factors and c for the share of the noise that they make, ((1 - c) I + c F F^T)^-1 = (I - F ((1 -
        c) / c I + F^T F)^-1 F^T) / (1 - c).
        """
        inner = self._factors.T @ self._factors
        inner.diagonal().add_((1 - _TOGETHER) / _TOGETHER)
        left: Tensor = values - self._factors @ torch.linalg.solve(inner, self._factors.T @ values)
        return left / (1 - _TOGETHER)

    def corrections(self, noises: Sequence[float]) -> Iterator[Tensor]:
        """The corrections ``(num_targets, num_train)``, in the unit of the scores, for each ratio of noise to prior."""
        solved = torch.zeros_like(self._residuals)
        for noise in noises:
            if noise == math.inf:
                yield torch.zeros_like(self._deviations)
                continue
            solved = self._solve(noise, solved)
            yield self._deviations * self._common(solved) / self._unit.sqrt()

    def _common(self, values: Tensor) -> Tensor:
        """The prior mean of eta times the roots: what models and targets say of each example at each target."""
        each = (values @ self._masks) * self._roots
        return (1 - _SHARED) * each + _SHARED * each.sum(0)

    def _covariance(self, values: Tensor, noise: float) -> Tensor:
        """The covariance of the residuals times ``(num_targets, num_models)`` numbers."""
        noisy = (1 - _TOGETHER) * values + _TOGETHER * (self._factors @ (self._factors.T @ values))
        return (self._common(values) * self._roots) @ self._masks.T + noise * noisy

    def _solve(self, noise: float, start: Tensor) -> Tensor:
        """The inverse covariance times the residuals, by conjugate gradients (Hestenes and Stiefel 1952)."""
        solved, left = start.clone(), self._residuals - self._covariance(start, noise)
        direction, squares = left.clone(), left.square().sum()
        enough = _TOLERANCE**2 * self._residuals.square().sum()
        for _ in range(_MAX_STEPS):
            if squares <= enough:
                break
            product = self._covariance(direction, noise)
            step = squares / (direction * product).sum()
            solved += step * direction
            left -= step * product
            before, squares = squares, left.square().sum()
            direction = left + squares / before * direction
        return solved
