"""The margin of a preferred text over a rejected one, under direct preference optimization."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_trak.checkpoints.copies import copy_module
from lightning_trak.outputs.base import ModelOutput
from lightning_trak.outputs.batches import Forward, one_per_example
from lightning_trak.outputs.language.causal import CausalLMMargin
from lightning_trak.outputs.margins import logistic_loss, token_log_likelihoods

Reference = nn.Module | Callable[[nn.Module, Any], Any]

_SIDES = ("chosen", "rejected")
_STORED = {side: f"ref_{side}_logps" for side in _SIDES}  # the reference's log-likelihoods in a batch


class PreferenceMargin(ModelOutput):
    r"""Margin of the chosen text over the rejected one, relative to a reference model.

    .. math:: f = \beta \left[\log \frac{\pi(y_w)}{\pi_{ref}(y_w)} - \log \frac{\pi(y_l)}{\pi_{ref}(y_l)}\right]

    is the difference of implicit rewards of direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290,
    equation 7), and the training loss is :math:`l = -\log \sigma(f)`. Hence Q = 1 - p and R = p(1 - p) with p =
    sigmoid(f). :math:`\log \pi(y)` is the sum of the log-probabilities of the tokens that count, as for
    :class:`~lightning_trak.outputs.CausalLMMargin`: labels other than -100 in ``attention_mask``. Give the prompt the
    label -100; if it counts in both texts, it cancels.

    Batches are mappings with ``chosen_input_ids`` and ``rejected_input_ids``, and for each of both
    ``..._attention_mask``, ``..._labels`` and further keywords of the module, if there are any; or pairs ``(chosen,
    rejected)`` of token ids or of mappings with ``input_ids``. The texts hold prompt and answer together, and the two
    need not have one length. The module is called on the chosen texts, and then on the rejected ones, and returns
    logits ``(batch, length, vocabulary)`` as for ``CausalLMMargin``.

    Args:
        reference: the model that training began with. A module is copied at once, with the weights that it has now,
            and called as the model is, in eval mode. A function ``(module, batch) -> logits`` gets the model and the
            ``input_ids``, ``attention_mask`` and so on of one of the texts, such as ``lambda module, batch:
            module.reference(**batch)`` or a call with adapters switched off. None: the batch, a mapping, holds the
            reference's log-likelihoods as ``ref_chosen_logps`` and ``ref_rejected_logps``, shape ``(batch,)``.
        beta: how far the model may move from the reference, as in training.
        forward: ``(module, batch) -> logits`` of one of the two texts, for modules that are called in another way.
    """

    def __init__(self, reference: Reference | None, beta: float = 0.1, forward: Forward | None = None) -> None:
        if not (isinstance(beta, (int, float)) and math.isfinite(beta) and beta > 0):
            raise ValueError(f"expected a positive beta, received {beta!r}")
        if reference is not None and not callable(reference):
            raise TypeError(
                "expected reference as a module, a function of (module, batch), or None, received a"
                f" {type(reference).__name__}"
            )
        if isinstance(reference, nn.Module):
            reference = copy_module(reference, configure=False).eval().requires_grad_(False)
        self.reference = reference
        self.beta = float(beta)
        self.texts = CausalLMMargin(forward=forward)
        called = reference is not None and not isinstance(reference, nn.Module)
        self.reference_texts = CausalLMMargin(forward=reference if called else forward)

    def output(self, module: nn.Module, batch: Any) -> Tensor:
        """The margin of each pair, shape ``(batch,)``.

        Raises:
            ValueError: if the batch, logits, labels or masks are not as the class describes.
            TypeError: if the batch is of another kind.
        """
        chosen, rejected = (self._log_ratio(module, batch, side, text) for side, text in self._texts(batch).items())
        if chosen.shape != rejected.shape:
            raise ValueError(
                f"expected a rejected text for each chosen one, received {len(chosen)} chosen and {len(rejected)}"
                " rejected"
            )
        return self.beta * (chosen - rejected)

    def explain_nan(self, module: nn.Module, batch: Any) -> str | None:
        """Says what is wrong with which of the two texts, if something is."""
        for side, text in self._texts(batch).items():
            reason = self.texts.explain_nan(module, text)
            if reason is not None:
                return f"in its {side} text, {reason}"
            reference = float(self._of_reference(module, batch, side, text))
            if not math.isfinite(reference):
                return f"the reference gives its {side} text the log-likelihood {reference}"
        return None

    def suspicion(self, module: nn.Module, batch: Any) -> str | None:
        """What :meth:`CausalLMMargin.suspicion` finds in one of the two texts."""
        found = (self.texts.suspicion(module, text) for text in self._texts(batch).values())
        return next(filter(None, found), None)

    def loss(self, output: Tensor) -> Tensor:
        """The loss of direct preference optimization at each margin, -log sigmoid(f); shape ``(batch,)``."""
        return logistic_loss(output)

    def _log_ratio(self, module: nn.Module, batch: Any, side: str, text: Any) -> Tensor:
        """The log-likelihood of each text of a side, minus that by the reference."""
        own, reference = self._log_likelihood(self.texts, module, text), self._of_reference(module, batch, side, text)
        if own.shape != reference.shape:
            raise ValueError(
                f"expected the reference's log-likelihood of each of {len(own)} {side} texts, received {len(reference)}"
            )
        return own - reference

    def _log_likelihood(self, texts: CausalLMMargin, module: nn.Module, text: Any) -> Tensor:
        return token_log_likelihoods(*texts.aligned(module, text)).sum(-1)

    def _of_reference(self, module: nn.Module, batch: Any, side: str, text: Any) -> Tensor:
        """The reference's log-likelihood of each text of a side, a constant."""
        if self.reference is None:
            name = _STORED[side]
            if not isinstance(batch, Mapping) or not isinstance(batch.get(name), Tensor):
                raise ValueError(
                    f"expected the reference's log-likelihoods in the batch, a Tensor under {name!r}; put them there,"
                    " or give PreferenceMargin the reference model"
                )
            return one_per_example(name, batch[name], "one log-likelihood for each text").detach()
        with torch.no_grad():
            if isinstance(self.reference, nn.Module):
                module, device = self.reference, _device_of(text)
                # Not unless it must be moved: inside torch.func, `to` would put wrapped tensors into the parameters.
                if any(parameter.device != device for parameter in module.parameters()):
                    module.to(device)
            return self._log_likelihood(self.reference_texts, module, text).detach()

    def _texts(self, batch: Any) -> dict[str, Any]:
        """The chosen and the rejected texts, each as a batch for a causal language model."""
        if isinstance(batch, (tuple, list)):
            if len(batch) != 2:
                raise ValueError(
                    f"expected a pair (chosen, rejected), received a {type(batch).__name__} of {len(batch)}"
                )
            return dict(zip(_SIDES, batch, strict=True))
        if not isinstance(batch, Mapping):
            raise TypeError(
                "expected a pair (chosen, rejected), or a mapping with chosen_input_ids and rejected_input_ids,"
                f" received a {type(batch).__name__}"
            )
        found = {
            side: {name.removeprefix(f"{side}_"): part for name, part in batch.items() if name.startswith(f"{side}_")}
            for side in _SIDES
        }
        missing = [f"{side}_input_ids" for side in _SIDES if "input_ids" not in found[side]]
        if missing:
            raise ValueError(
                f"expected chosen_input_ids and rejected_input_ids in the batch, received {', '.join(map(str, batch))}"
            )
        known = _STORED.values() if self.reference is None else ()
        others = [name for name in batch if name not in known and not name.startswith(("chosen_", "rejected_"))]
        if others:
            raise ValueError(
                f"the batch also holds {', '.join(map(str, others))}, which belongs to neither text: put prompt and"
                " answer together in chosen_input_ids and rejected_input_ids, with the label -100 for the prompt in"
                " chosen_labels and rejected_labels, and leave out what is not used"
            )
        return found


def _device_of(text: Any) -> torch.device:
    tensors = text.values() if isinstance(text, Mapping) else text if isinstance(text, (tuple, list)) else (text,)
    return next(part.device for part in tensors if isinstance(part, Tensor))
