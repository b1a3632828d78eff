"""Outputs of language models: the margin or the log-likelihood of a text's tokens."""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_trak.outputs.batches import LABELS_KEYS, Forward, LabelsKey, has_key, split_labels
from lightning_trak.outputs.language.tokens import IGNORED, Reduction, TokenOutput, Tokens, token_ids
from lightning_trak.outputs.linear import LinearLossOutput
from lightning_trak.outputs.margins import log_odds, logistic_loss, token_log_likelihoods


class _Margin(TokenOutput):
    """The mean margin of the tokens."""

    def __init__(
        self,
        pad_token_id: int | None = None,
        forward: Forward | None = None,
        labels_key: LabelsKey = LABELS_KEYS,
        *,
        per_token: bool = False,
    ) -> None:
        super().__init__(pad_token_id, forward, labels_key, "mean", per_token)

    def loss(self, output: Tensor) -> Tensor:
        """The cross-entropy of a token at each mean margin, shape ``(batch,)``."""
        return logistic_loss(output)

    def _values(self, logits: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        return log_odds(logits, torch.where(counted, labels, 0))


class _Causal(TokenOutput):
    """Logits at t - 1 are read against the label at t."""

    def tokens(self, batch: Any) -> Tokens:
        """See :meth:`TokenOutput.tokens`."""
        inputs, given = self._split(batch)
        labels = token_ids(given)
        if not labels.shape[1]:
            raise ValueError("expected texts of at least two tokens, received texts without any")
        counted, present = self._counted(labels), torch.ones_like(labels)
        attention = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if attention is not None:
            if attention.shape != labels.shape:
                raise ValueError(
                    f"expected attention_mask of the labels' shape {tuple(labels.shape)}, received"
                    f" {tuple(attention.shape)}; for other masks subclass CausalLMMargin, or use NegativeLoss"
                )
            present = (attention != 0).long()
        predicted = (present == 1) & (F.pad(present[:, :-1], (1, 0)) == 1)  # the first token never is
        return Tokens(inputs, labels, counted & predicted, present.cumsum(1) - 1)

    def aligned(self, module: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`TokenOutput.aligned`."""
        logits, labels, counted = super().aligned(module, batch)
        # The last position predicts nothing. A slice of the logits would cost a copy of them.
        following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        return logits, following, F.pad(counted[:, 1:], (0, 1), value=False)

    def suspicion(self, module: nn.Module, batch: Any) -> str | None:
        """Says that labels are those of the next tokens, or that the module predicts tokens from later ones, if so."""
        if self._are_next_tokens(batch):
            return (
                "the label at t is the token at t + 1, and the output reads the logits at t - 1 against the label at t,"
                " so that scores are those of predicting the token after the next. Give labels that are aligned with"
                " the ids, as Hugging Face does, such as a batch of whole texts alone; or take Seq2SeqLMMargin, which"
                " reads the logits at t against the label at t"
            )
        other = _with_another_end(batch)
        if other is None:
            return None
        one, two = (self.aligned(module, given)[0].detach()[:, :-1] for given in (batch, other))
        rounding = min(0.05, 2**10 * torch.finfo(one.dtype).eps)
        if (one - two).nan_to_num().abs().max() <= rounding * one.abs().max():
            return None
        return (
            f"{type(module).__name__} predicts tokens from later ones, so that it is no causal language model, and"
            f" {type(self).__name__} reads its logits as if it were: those at t - 1 against token t. For a masked"
            " language model take SegmentationMargin, with logits of shape (batch, vocabulary, length)"
        )

    def _are_next_tokens(self, batch: Any) -> bool:
        """Whether each label that counts is the token after its own."""
        ids, (_, labels, counted, _) = _ids(batch), self.tokens(batch)
        if ids is None or ids.shape != labels.shape:
            return False
        labels, counted = labels[:, :-1], counted[:, :-1]
        own, following = ((labels != tokens)[counted] for tokens in (ids[:, :-1], ids[:, 1:]))
        return bool(own.any()) and not bool(following.any())

    def _split(self, batch: Any) -> tuple[Any, Tensor]:
        """The module's inputs without the labels, and the labels, which are the ids unless given."""
        if isinstance(batch, Tensor):
            return batch, batch
        if isinstance(batch, (tuple, list)) and len(batch) == 1:
            return batch, batch[0]
        if (
            isinstance(batch, Mapping)
            and "input_ids" in batch
            and not any(has_key(batch, key) for key in self.labels_key)
        ):
            return batch, batch["input_ids"]
        if isinstance(batch, (tuple, list)) and len(batch) > 2:
            raise ValueError(
                f"expected a batch (ids,) or (ids, labels), received a {type(batch).__name__} of {len(batch)}; give"
                " further inputs, such as attention_mask, in a mapping"
            )
        return split_labels(batch, self.labels_key)


def _with_another_end(batch: Any) -> Any:
    """A batch with its first token in the place of the last; None if that is not known to be another text."""
    ids = _ids(batch)
    if ids is None or ids.ndim != 2 or ids.shape[1] < 3 or bool((ids[:, 0] == ids[:, -1]).any()):
        return None
    changed = torch.cat([ids[:, :-1], ids[:, :1]], dim=1)
    if isinstance(batch, MutableMapping):
        other = copy.copy(batch)
        other["input_ids"] = changed
        return other
    return changed if isinstance(batch, Tensor) else (changed, *batch[1:])


def _ids(batch: Any) -> Tensor | None:
    """The token ids of a batch; None if it is not known where they are."""
    if isinstance(batch, MutableMapping):
        ids = batch.get("input_ids")
    else:
        ids = batch[0] if type(batch) in (tuple, list) else batch
    return ids if isinstance(ids, Tensor) else None


class CausalLMMargin(_Margin, _Causal):
    r"""Margin of a causal language model, :math:`f = \mathrm{mean}_t [\log p_t - \log(1 - p_t)]`.

    p_t is the probability of token t after the tokens before it, so logits at t - 1 are read against the label at t.
    The loss is that of one token at the mean margin, :math:`l = \log(1 + e^{-f})`. Each token is a classification over
    the vocabulary, as Park et al. 2023 (arXiv 2303.14186, section 5.2) treat language models.

    A token counts if its label is not -100 or ``pad_token_id``, and neither it nor the position that predicts it has
    ``attention_mask`` 0; then a text has the same value at any padding, left or right. A text in which nothing counts
    has no margin: the output is NaN, so that featurizing stops and names the example.

    Batches are a tensor of token ids ``(batch, length)``, a tuple ``(ids,)`` or ``(ids, labels)``, or a mapping of the
    module's keywords. Labels are aligned with the ids as in Hugging Face, default to the ids, and are not passed on.
    The module returns logits ``(batch, length, vocabulary)``, as a tensor, as ``logits`` or first of a tuple.

    Args:
        pad_token_id: a label to leave out. Where padding and the end of a text share an id, rather give
            ``attention_mask``, which keeps the end.
        forward: ``(module, batch) -> logits``, for modules that are called in another way.
        labels_key: where the labels are: a key, a position in a tuple, or a function of the batch; of several, the
            first that the batch has.
        per_token: for targets alone: a row of scores for the margin of each token that counts. The mean of a text's
            rows is the row of the text, for scores of the output. The loss of a row is that of the token, -log p_t;
            those of a text's rows do not add up to the loss of the text, which is that of the mean margin.
    """


class CausalLMLogLikelihood(LinearLossOutput, _Causal):
    r"""Log-likelihood of a text under a causal language model, :math:`f = T^{-a} \sum_t \log p_t`, in nats.

    The training loss is :math:`l = -f`; Q = 1, and R is set to 1: see
    :class:`~lightning_trak.outputs.linear.LinearLossOutput`. T is the number of tokens that count. Which do, and how
    batches are read, is as for :class:`CausalLMMargin`.

    ``reduction`` says how the length of a text counts. With ``"sum"``, a = 0, f is the log-probability of the whole
    text, and the gradient of a training text grows with its length, as in training on the mean over all tokens of a
    batch. With ``"mean"``, a = 1, f is that of an average token; texts count alike in training on a mean over texts,
    but the gradient of a long text is small, because those of its tokens partly cancel. With ``"sqrt"``, a = 1/2,
    gradients have one scale at all lengths, if those of tokens are as good as independent. For a target, ``reduction``
    changes the scale of its row; for training texts, whose output is that of the store, also their order.

    Args:
        pad_token_id: as for :class:`CausalLMMargin`.
        forward: as for :class:`CausalLMMargin`.
        labels_key: as for :class:`CausalLMMargin`.
        reduction: ``"sum"``, ``"mean"`` or ``"sqrt"``.
        per_token: for targets alone: a row of scores for the log-probability of each token that counts. The sum of a
            text's rows, times :math:`T^{-a}`, is the row of the text.
    """

    def __init__(
        self,
        pad_token_id: int | None = None,
        forward: Forward | None = None,
        labels_key: LabelsKey = LABELS_KEYS,
        *,
        reduction: Reduction = "sum",
        per_token: bool = False,
    ) -> None:
        TokenOutput.__init__(self, pad_token_id, forward, labels_key, reduction, per_token)

    def _values(self, logits: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
        return token_log_likelihoods(logits, labels, counted)


class Seq2SeqLMMargin(_Margin):
    r"""Margin of an encoder-decoder language model, :math:`f = \mathrm{mean}_t [\log p_t - \log(1 - p_t)]`.

    As :class:`CausalLMMargin`, but logits at t are read against the label at t, and a token counts if its label is not
    -100 or ``pad_token_id``; ``attention_mask`` is the encoder's.

    Batches are mappings of the module's keywords with labels. The labels are passed on, since Hugging Face models make
    the decoder's input from them, unless ``decoder_input_ids`` are given. Or batches are tuples of the module's
    positional arguments, the decoder's input included, and then the labels.

    Args:
        pad_token_id: a label to leave out, for labels padded with it rather than with -100.
        forward: ``(module, batch) -> logits``, for modules that are called in another way.
        labels_key: where the labels are: a key, a position in a tuple, or a function of the batch; of several, the
            first that the batch has.
        per_token: as for :class:`CausalLMMargin`.
    """

    def tokens(self, batch: Any) -> Tokens:
        """See :meth:`TokenOutput.tokens`."""
        inputs, given = split_labels(batch, self.labels_key)
        if isinstance(batch, Mapping) and "decoder_input_ids" not in batch:
            inputs = batch
        labels = token_ids(given)
        return Tokens(inputs, labels, self._counted(labels), torch.ones_like(labels).cumsum(1) - 1)
