"""The advantage-weighted log-likelihood of actions, as policy gradients raise it."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_trak.checks import require_one_of
from lightning_trak.outputs.batches import (
    LABELS_KEYS,
    Forward,
    LabelsKey,
    as_keys,
    has_key,
    one_per_example,
    predict,
    split_labels,
)
from lightning_trak.outputs.language.causal import CausalLMMargin
from lightning_trak.outputs.linear import LinearLossOutput
from lightning_trak.outputs.margins import token_log_likelihoods

_OTHERWISE = "for continuous actions use NegativeLoss with -advantage * log-likelihood"


class AdvantageLogLikelihood(LinearLossOutput):
    r"""Log-likelihood of an example's actions, weighted by their advantages: :math:`f = \sum_t A_t \log \pi(a_t|s_t)`.

    Its gradient is that of REINFORCE (Williams 1992, Machine Learning 8), and that of PPO and GRPO at the policy that
    drew the actions. The training loss is :math:`l = -f`; Q = 1, and R is set to 1: see
    :class:`~lightning_trak.outputs.linear.LinearLossOutput`. Advantages are constants.

    Batches are mappings with ``advantages`` or ``advantage``, or tuples that end with them.

    - With ``actions="tokens"``, the rest is a batch as for :class:`~lightning_trak.outputs.CausalLMMargin`, and each
      token is an action. It counts if its label is not -100 and it is in ``attention_mask``. Advantages are of shape
      ``(batch,)`` or, aligned with the labels, ``(batch, length)``.
    - With ``actions="one"``, the rest is a batch as for :class:`~lightning_trak.outputs.ClassificationMargin`. The
      label is the action, an index. Advantages are of shape ``(batch,)``.

    An advantage that is not finite, an action outside the logits, and a text without a token that counts give no
    output: featurizing stops and names the example.

    Args:
        actions: ``"tokens"``: the tokens of a text; ``"one"``: one action for each example.
        reduction: ``"sum"`` over the tokens, or ``"mean"`` over those that count.
        advantages_key: where the advantages are: a key or attribute, a position in a tuple, or a function of the
            batch; of several, the first that the batch has.
        forward: ``(module, batch) -> logits``, for modules that are called in another way. Its batch is without the
            advantages.
        labels_key: where the actions are in the rest of the batch, likewise.
    """

    def __init__(
        self,
        actions: Literal["tokens", "one"] = "tokens",
        reduction: Literal["sum", "mean"] = "sum",
        advantages_key: LabelsKey = ("advantages", "advantage"),
        forward: Forward | None = None,
        labels_key: LabelsKey = LABELS_KEYS,
    ) -> None:
        require_one_of("actions", actions, ("tokens", "one"))
        require_one_of("reduction", reduction, ("sum", "mean"))
        self.actions = actions
        self.reduction = reduction
        self.advantages_key = as_keys(advantages_key)
        self.texts = CausalLMMargin(forward=forward, labels_key=labels_key)

    def output(self, module: nn.Module, batch: Any) -> Tensor:
        """The weighted log-likelihood of each example's actions, shape ``(batch,)``.

        Raises:
            ValueError: if batch, logits, actions or advantages are not as the class describes.
        """
        logits, labels, counted, advantages = self._parts(module, batch)
        likelihoods = token_log_likelihoods(logits, labels, counted)
        weighted = (torch.where(counted, advantages, 0).to(likelihoods.dtype) * likelihoods).sum(-1)
        return weighted / counted.sum(-1) if self.reduction == "mean" else weighted

    def explain_nan(self, module: nn.Module, batch: Any) -> str | None:
        """Says which advantage is not finite, or what is wrong with the actions, if something is."""
        logits, labels, counted, advantages = self._parts(module, batch)
        wrong = [value for value in advantages.expand_as(counted)[counted].tolist() if not math.isfinite(value)]
        if wrong:
            return f"its advantage is {wrong[0]}; leave it out of the dataset"
        if not counted.any():
            return "none of its tokens counts, as all are masked or labelled -100; leave it out of the dataset"
        outside = labels[counted & ((labels < 0) | (labels >= logits.shape[-1]))].tolist()
        if outside:
            return f"one of its actions is {outside[0]}, and the model has {logits.shape[-1]}, from 0"
        return None

    def suspicion(self, module: nn.Module, batch: Any) -> str | None:
        """Of tokens, what :meth:`CausalLMMargin.suspicion` finds in the texts."""
        if self.actions == "one":
            return None
        texts, _ = split_labels(batch, self.advantages_key)
        return self.texts.suspicion(module, texts)

    def _parts(self, module: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits ``(batch, length, actions)``, actions and whether they count ``(batch, length)``, and advantages."""
        last = isinstance(batch, (tuple, list)) and len(batch) > 1
        if not any(has_key(batch, key) for key in self.advantages_key) and not last:
            names = " or ".join(map(repr, self.advantages_key))
            raise ValueError(
                f"expected the advantages under {names} in the batch, or as the last element of a tuple, received a"
                f" {type(batch).__name__}; name them with advantages_key="
            )
        rest, advantages = split_labels(batch, self.advantages_key)
        advantages = advantages.detach()
        if self.actions == "one":
            inputs, labels = split_labels(rest, self.texts.labels_key)
            labels = one_per_example("actions", labels, _OTHERWISE)
            advantages = one_per_example("advantages", advantages, "one for each action")
            logits = predict(module, rest, inputs, self.texts.forward)
            if logits.ndim != 2 or logits.shape[:1] != labels.shape or labels.is_floating_point():
                raise ValueError(
                    f"expected logits of shape ({len(labels)}, actions) for integer actions of shape"
                    f" ({len(labels)},), received {tuple(logits.shape)} and {labels.dtype} actions; {_OTHERWISE}"
                )
            if advantages.shape != labels.shape:
                raise ValueError(f"expected {len(labels)} advantages, one for each action, received {len(advantages)}")
            logits, labels, advantages = logits.unsqueeze(1), labels.unsqueeze(1), advantages.unsqueeze(1)
            return logits, labels, torch.ones_like(labels, dtype=torch.bool), advantages
        logits, labels, counted = self.texts.aligned(module, rest)
        if advantages.shape == labels.shape:
            advantages = F.pad(advantages[:, 1:], (0, 1))  # that of the token which a position predicts
        elif advantages.shape in (labels.shape[:1], (len(labels), 1)):
            advantages = advantages.reshape(-1, 1)
        else:
            raise ValueError(
                f"expected advantages of shape {tuple(labels.shape[:1])} or {tuple(labels.shape)}, received"
                f" {tuple(advantages.shape)}"
            )
        return logits, labels, counted, advantages
