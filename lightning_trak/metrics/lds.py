"""The linear datamodeling score as a metric that collects targets over batches and processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from lightning_trak.checks import require_one_of
from lightning_trak.metrics.functional.equal_subsets import _same_subsets, _subsets_digest, _validate_unused
from lightning_trak.metrics.functional.lds import (
    ConstantRows,
    _linear_datamodeling_score_compute,
    _linear_datamodeling_score_interval,
    _linear_datamodeling_score_update,
    _validate_masks,
)
from lightning_trak.metrics.functional.noise_ceiling import noise_ceiling
from lightning_trak.texts.display import Displayed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

if find_spec("matplotlib") is None:
    __doctest_skip__ = ["LinearDatamodelingScore.plot"]


class LinearDatamodelingScore(Displayed, Metric):
    """Linear datamodeling score: how well attributions predict what retraining on subsets does.

    The scores of a subset's training examples are added up as a prediction of the output of a model trained on that
    subset alone; the score of a target is Spearman's rank correlation, over subsets, of that prediction with the true
    output (arXiv 2303.14186, definition 2.3). ``compute`` gives the mean over all targets seen.

    ``update`` takes

    - ``scores`` ``(batch, num_train)``: attributions of a batch of targets;
    - ``outputs`` ``(batch, num_subsets)``, or ``(batch, num_subsets, num_seeds)``: outputs of the retrained models at
      these targets, averaged over seeds.

    It keeps ``(batch, num_subsets)`` numbers, in float64 whatever the dtype of the inputs or of the module around it.
    Targets shown twice count twice: Lightning's ``test`` repeats some to make its processes even.

    Args:
        masks: bool ``(num_subsets, num_train)``, true where the subset holds the example. It moves between
            devices with the metric and is not part of its ``state_dict``. Targets of a metric with other masks are
            refused, in another process, in ``merge_state`` and, by a RuntimeError, in ``load_state_dict``.
        constant_rows: how to treat a target whose predicted or true outputs are the same for all subsets, and which has
            no rank correlation. ``"zero"`` counts it as 0, so that every method is averaged over the same targets
            and none gains by predicting nothing; ``"ignore"`` leaves it out; ``"error"`` refuses it in ``update``.
        used_masks: bool ``(num_used, num_train)``, subsets whose models the scores were made with, such as a method's
            ``used_masks``. They may not be among ``masks``, whatever the seed of their models.
        kwargs: see :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If the masks are not boolean, fewer than 3, empty, repeated or used, or the policy is unknown.

    Example:
        >>> import torch
        >>> from lightning_trak.metrics import LinearDatamodelingScore
        >>> _ = torch.manual_seed(0)
        >>> masks = torch.rand(20, 50) < 0.5
        >>> scores = torch.randn(10, 50)
        >>> outputs = (scores @ masks.float().T)[..., None] + 3 * torch.randn(10, 20, 2)
        >>> lds = LinearDatamodelingScore(masks)
        >>> lds.update(scores[:5], outputs[:5])
        >>> lds.update(scores[5:], outputs[5:])
        >>> low, high = lds.interval()
        >>> bool(low < lds.compute() < high)
        True
        >>> lds.per_target().shape
        torch.Size([10])
        >>> bool(lds.noise_ceiling() < 1)
        True
    """

    _shown = ("masks", "constant_rows", "update_count")

    is_differentiable: bool = False
    higher_is_better: bool = True
    full_state_update: bool = False
    plot_lower_bound: float = -1.0
    plot_upper_bound: float = 1.0

    masks: Tensor
    subsets: Tensor
    predictions: list[Tensor]
    outputs: list[Tensor]
    ceilings: list[Tensor]

    def __init__(
        self,
        masks: Tensor,
        constant_rows: ConstantRows = "zero",
        used_masks: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        _validate_masks(masks)
        _validate_unused(masks, used_masks)
        require_one_of("constant_rows", constant_rows, get_args(ConstantRows))
        self.constant_rows = constant_rows
        self.register_buffer("masks", masks.clone(), persistent=False)
        # States of other subsets are then neither merged with these nor loaded, and a MetricCollection, which shares
        # states that are equal after the first update, does not take them for the same.
        self.add_state("subsets", default=_subsets_digest(masks), dist_reduce_fx=_same_subsets)
        self.add_state("predictions", default=[], dist_reduce_fx="cat")
        self.add_state("outputs", default=[], dist_reduce_fx="cat")
        self.add_state("ceilings", default=[], dist_reduce_fx="cat")

    def update(self, scores: Tensor, outputs: Tensor) -> None:
        """Add a batch of targets.

        Args:
            scores: ``(batch, num_train)`` attributions.
            outputs: ``(batch, num_subsets)`` or ``(batch, num_subsets, num_seeds)``.

        Raises:
            ValueError: If a shape or device does not fit, a row is not finite, or (with ``constant_rows="error"``) a
                row is constant; the batch is then not counted.
        """
        predictions, averaged = _linear_datamodeling_score_update(scores, outputs, self.masks)
        if self.constant_rows == "error":
            _linear_datamodeling_score_compute(predictions, averaged, "error")
        has_seeds = outputs.ndim == 3 and outputs.shape[2] > 1
        ceilings = (
            noise_ceiling(outputs.detach()) if has_seeds else predictions.new_full((len(predictions),), torch.nan)
        )
        self.predictions.append(predictions)
        self.outputs.append(averaged)
        self.ceilings.append(ceilings)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add a batch of targets, as :meth:`update` does, and give :meth:`compute` of this batch alone."""
        before = self.__dict__.copy()  # torchmetrics sets the states aside, and after an error leaves them there
        try:
            return super().forward(*args, **kwargs)
        except BaseException:
            self.__dict__.update(before)
            raise

    def reset(self) -> None:
        """Forget all targets."""
        # torchmetrics would empty the lists, which others may have: `Running`, and metrics of a `MetricCollection`.
        self.predictions, self.outputs, self.ceilings = [], [], []
        super().reset()

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the targets of another metric before these, as :meth:`torchmetrics.Metric.merge_state` does.

        Raises:
            ValueError: If its masks are others.
        """
        super().merge_state(incoming_state)
        self._computed = None

    def compute(self) -> Tensor:
        """Mean over all targets: float64 scalar, NaN if ``constant_rows="ignore"`` left no target."""
        return self._per_target().nanmean()

    def per_target(self) -> Tensor:
        """Each target's rank correlation, ``(num_targets,)`` float64, in the order of updates and then of processes.

        ``merge_state`` puts the targets of the other metric first.

        Targets left out by ``constant_rows="ignore"`` are NaN. All processes must call it together.
        """
        with self._synced():
            return self._per_target()

    def interval(self, confidence: float = 0.95, num_bootstraps: int = 1000, seed: int = 0) -> Tensor:
        """Bootstrap interval of ``compute()``, over new targets *and* new subsets. All processes must call it together.

        The method and its simulated coverage: :func:`~lightning_trak.metrics.functional.linear_datamodeling_interval`.

        Args:
            confidence: of the interval, in (0, 1).
            num_bootstraps: replicates.
            seed: of the replicates; the global random state is neither read nor changed.

        Returns:
            ``(2,)`` float64: lower and upper end, in [-1, 1].

        Raises:
            ValueError: If fewer than 2 targets count, or an argument is out of its range.
        """
        with self._synced():
            predictions, outputs = self._targets()
            return _linear_datamodeling_score_interval(
                predictions, outputs, self.constant_rows, confidence, num_bootstraps, seed
            )

    def noise_ceiling(self) -> Tensor:
        """The highest ``compute()`` that any method can be expected to reach against these outputs.

        The outputs are means over a few noisy retrainings; the method and its limits are those of
        :func:`~lightning_trak.metrics.functional.noise_ceiling`. The mean is over the targets that ``compute`` counts.
        All processes must call it together.

        Returns:
            float64 scalar in [0, 1].

        Raises:
            RuntimeError: If any target came with a single seed per subset.
        """
        with self._synced():
            ceilings, counted = dim_zero_cat(self.ceilings), ~self._per_target().isnan()
            single = int(ceilings.isnan().sum())
            if single:
                raise RuntimeError(
                    "Expected `outputs` of shape `(batch, num_subsets, num_seeds)` with at least 2 seeds in every "
                    f"update, but {single} of {len(ceilings)} targets came with one: retrain each subset again."
                )
            return ceilings[counted].mean()

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Axes | None = None) -> tuple[Figure, Any]:
        """Plot one value or several.

        Args:
            val: a result of ``forward`` or ``compute``, or a list of them; ``compute()`` is called if there is none.
            ax: a matplotlib axis to draw on.

        Returns:
            Figure and axis.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.

        Example:
            >>> import torch
            >>> from lightning_trak.metrics import LinearDatamodelingScore
            >>> lds = LinearDatamodelingScore(torch.eye(4).bool())
            >>> lds.update(torch.randn(2, 4), torch.randn(2, 4))
            >>> figure, axis = lds.plot()
        """
        return self._plot(val, ax)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the targets of all processes, as :meth:`torchmetrics.Metric.sync` does."""
        # A process without targets would offer 1-D float32 tensors, which cannot be gathered with the others' states.
        if not self._is_synced and not self.predictions:
            empty = torch.empty(0, len(self.masks), dtype=torch.float64, device=self.device)
            self.predictions, self.outputs, self.ceilings = [empty], [empty.clone()], [empty[:, 0]]
        super().sync(*args, **kwargs)

    @contextmanager
    def sync_context(
        self,
        dist_sync_fn: Callable[..., Any] | None = None,
        process_group: Any | None = None,
        should_sync: bool = True,
        should_unsync: bool = True,
        distributed_available: Callable[[], bool] | None = None,
    ) -> Iterator[None]:
        """As :meth:`torchmetrics.Metric.sync_context`, but the local state comes back after an error too."""
        self.sync(dist_sync_fn, process_group, should_sync, distributed_available)
        try:
            yield
        finally:
            self.unsync(should_unsync=self._is_synced and should_unsync)

    def _synced(self) -> AbstractContextManager[None]:
        return self.sync_context(self.dist_sync_fn, should_sync=self.sync_on_compute)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        saved = state_dict.get(f"{prefix}subsets", self.subsets)
        try:
            _same_subsets(torch.stack([self.subsets, saved.to(self.subsets)]))
        except ValueError as error:
            error_msgs.append(str(error))
            return
        self._computed = None
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _targets(self) -> tuple[Tensor, Tensor]:
        if not len(self.predictions) or not len(dim_zero_cat(self.predictions)):
            raise RuntimeError("Expected targets, but none were seen: call `update(scores, outputs)` first.")
        return dim_zero_cat(self.predictions), dim_zero_cat(self.outputs)

    def _per_target(self) -> Tensor:
        return _linear_datamodeling_score_compute(*self._targets(), self.constant_rows)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        # States follow a module between devices but not to its dtype: `.to(torch.bfloat16)`, which Lightning's true
        # half precision calls, would merge ranks for good.
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), exclude_state)
