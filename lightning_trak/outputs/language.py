"""The mean margin of a text's tokens."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_trak.outputs.batches import LABELS_KEYS, Forward, LabelsKey, has_key, predict, split_labels
from lightning_trak.outputs.labelled import LabelledOutput
from lightning_trak.outputs.margins import log_odds, logistic_loss

IGNORED = -100  # the label that torch.nn.CrossEntropyLoss and Hugging Face leave out


class _LanguageModelMargin(LabelledOutput):
    """Base of the margins of language models, which differ in which logits are read against which labels."""

    def __init__(
        self,
        pad_token_id: int | None = None,
        forward: Forward | None = None,
        labels_key: LabelsKey = LABELS_KEYS,
    ) -> None:
        super().__init__(forward, labels_key)
        self.pad_token_id = pad_token_id

    def output(self, module: nn.Module, batch: Any) -> Tensor:
        """The mean token margin of each example, shape ``(batch,)``.

        Raises:
            ValueError: if batch, logits, labels or attention mask are not as the class describes.
        """
        return _mean_margin(*self._aligned(module, batch))

    def explain_nan(self, module: nn.Module, batch: Any) -> str | None:
        """Says that no token counts, or which label is outside the vocabulary, if so."""
        logits, labels, counted = self._aligned(module, batch)
        vocabulary, labels = logits.shape[-1], labels[counted]
        if not len(labels):
            skipped = "-100" if self.pad_token_id is None else f"-100 or pad_token_id={self.pad_token_id}"
            return f"none of its tokens counts, as all are masked or labelled {skipped}; leave it out of the dataset"
        outside = labels[(labels < 0) | (labels >= vocabulary)].tolist()
        if not outside:
            return None
        return f"one of its labels is {outside[0]}, and the vocabulary has {vocabulary} tokens, 0 to {vocabulary - 1}"

    @abstractmethod
    def _aligned(self, module: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, the label of each, and whether it counts: ``(batch, length[, vocabulary])``."""

    def loss(self, output: Tensor) -> Tensor:
        """The cross-entropy of a token at each mean margin, shape ``(batch,)``."""
        return logistic_loss(output)

    def _counted(self, labels: Tensor) -> Tensor:
        counted = labels != IGNORED
        return counted if self.pad_token_id is None else counted & (labels != self.pad_token_id)


class CausalLMMargin(_LanguageModelMargin):
    r"""Margin of a causal language model, :math:`f = \mathrm{mean}_t [\log p_t - \log(1 - p_t)]`.

    p_t is the probability of token t after the tokens before it, so logits at t - 1 are read against the label at t.
    The loss is that of one token at the mean margin, :math:`l = \log(1 + e^{-f})`. Each token is a classification over
    the vocabulary, as Park et al. 2023 (arXiv 2303.14186, section 5.2) treat language models.

    A token counts if its label is not -100 or ``pad_token_id``, and neither it nor the position that predicts it has
    ``attention_mask`` 0; then a text has the same value at any padding, left or right. A text in which nothing counts
    has no margin: the output is NaN, so that featurizing stops and names the example.

    Batches are a tensor of token ids ``(batch, length)``, a tuple ``(ids,)`` or ``(ids, labels)``, or a mapping of the
    module's keywords; labels are aligned with the ids as in Hugging Face, default to the ids, and are not passed on.
    The module returns logits ``(batch, length, vocabulary)``, as a tensor, as ``logits`` or first of a tuple.

    Args:
        pad_token_id: a label to leave out. Where padding and the end of a text share an id, rather give
            ``attention_mask``, which keeps the end.
        forward: ``(module, batch) -> logits``, for modules that are called in another way.
        labels_key: where the labels are: a key, a position in a tuple, or a function of the batch; of several, the
            first that the batch has.
    """

    def _aligned(self, module: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        inputs, labels = self._split(batch)
        logits = predict(module, batch, inputs, self.forward)
        _check_shapes(logits, labels)
        if labels.shape[1] < 2:
            raise ValueError("expected texts of at least two tokens, received one: the first token is never predicted")
        counted = self._counted(labels)[:, 1:]
        attention = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if attention is not None:
            if attention.shape != labels.shape:
                raise ValueError(
                    f"expected attention_mask of the labels' shape {tuple(labels.shape)}, received"
                    f" {tuple(attention.shape)}; for other masks subclass CausalLMMargin, or use NegativeLoss"
                )
            counted = counted & (attention[:, 1:] != 0) & (attention[:, :-1] != 0)
        # The last position predicts nothing. A slice of the logits would cost a copy of them.
        following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        return logits, following, F.pad(counted, (0, 1), value=False)

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


class Seq2SeqLMMargin(_LanguageModelMargin):
    r"""Margin of an encoder-decoder language model, :math:`f = \mathrm{mean}_t [\log p_t - \log(1 - p_t)]`.

    As :class:`CausalLMMargin`, but logits at t are read against the label at t, and a token counts if its label is not
    -100 or ``pad_token_id``; ``attention_mask`` is the encoder's.

    Batches are mappings of the module's keywords with labels, which are passed on (Hugging Face models make the
    decoder's input from them) unless ``decoder_input_ids`` are given; or tuples of the module's positional arguments,
    the decoder's input included, and then the labels.

    Args:
        pad_token_id: a label to leave out, for labels padded with it rather than with -100.
        forward: ``(module, batch) -> logits``, for modules that are called in another way.
        labels_key: where the labels are: a key, a position in a tuple, or a function of the batch; of several, the
            first that the batch has.
    """

    def _aligned(self, module: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        inputs, labels = split_labels(batch, self.labels_key)
        if isinstance(batch, Mapping) and "decoder_input_ids" not in batch:
            inputs = batch
        logits = predict(module, batch, inputs, self.forward)
        _check_shapes(logits, labels)
        return logits, labels, self._counted(labels)


def _check_shapes(logits: Tensor, labels: Tensor) -> None:
    if labels.ndim != 2 or labels.is_floating_point():
        raise ValueError(
            f"expected labels as token ids of shape (batch, length), received {labels.dtype} of shape"
            f" {tuple(labels.shape)}"
        )
    if logits.ndim != 3 or logits.shape[:2] != labels.shape:
        raise ValueError(
            f"expected logits of shape ({labels.shape[0]}, {labels.shape[1]}, vocabulary), for labels of shape"
            f" {tuple(labels.shape)}, received {tuple(logits.shape)}; pass forward= if the module returns others"
        )


def _mean_margin(logits: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
    """Mean of the counted tokens' margins, NaN with NaN gradients where none is; shape ``(batch,)``."""
    margins = log_odds(logits, torch.where(counted, labels, 0))
    weights = counted.to(margins.dtype) / counted.sum(-1, keepdim=True)  # 0/0 where nothing counts
    # Selected, not only weighted by zero: a token that does not count may have an infinite margin.
    kept = torch.where(counted | weights.isnan(), margins, 0.0)
    return (kept * weights).sum(-1)
