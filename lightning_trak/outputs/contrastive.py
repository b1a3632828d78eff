"""The margin of a matching pair of embeddings against a bank of other pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_trak.checks import integer, require_bool
from lightning_trak.outputs.base import ModelOutput
from lightning_trak.outputs.batches import call_module
from lightning_trak.outputs.margins import logistic_loss, nan_unless

Embed = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]
Temperature = float | Callable[[nn.Module], float | Tensor]


class ContrastiveMargin(ModelOutput):
    r"""Margin of a pair (image and text, say) under a contrastive loss such as CLIP's.

    For embeddings :math:`\phi, \psi` of the pair, pairs :math:`\phi_j, \psi_j` of a bank and a temperature T,

    .. math:: f = -\log \sum_j e^{(\phi \cdot \psi_j - \phi \cdot \psi)/T}
                  -\log \sum_j e^{(\phi_j \cdot \psi - \phi \cdot \psi)/T},

    the margins of "which text belongs to this image" and of its converse (Park et al. 2023, arXiv 2303.14186, section
    5.1.1). The two have one loss together as a function of f alone if each is given half of it: :math:`l = 2 \log(1 +
    e^{-f/2})`, so Q = 1 - p and R = p(1 - p)/2 with p = sigmoid(f/2).

    The bank holds embeddings of training pairs at the current checkpoint, as constants. It stands for the rest of the
    training batch. An entry that equals the pair in both embeddings is the pair itself, or a copy, which is as right an
    answer: it is no negative. Only values are compared, so the output of an example does not depend on its place in the
    data or in a batch. A pair without any negative gives NaN.

    Args:
        temperature: T, or a function of the module, e.g. ``lambda clip: 1 / clip.logit_scale.exp()`` if it is learned.
        context_size: number of pairs in the bank, drawn from the training set.
        embed: ``(module, batch) -> (first, second)``, embeddings of shape ``(batch, dim)``. By default the module is
            called on a mapping's items as keywords or on a tuple's elements, and returns such a pair, or an object or
            mapping with ``image_embeds`` and ``text_embeds``.
        normalize: scale embeddings to unit length, as CLIP does.
        tolerance: largest relative distance of embeddings that count as equal. Embeddings differ by rounding from one
            batch composition to another, in bfloat16 by about 1e-2.
    """

    averages = True  # both directions; and what a pair does as a negative of others is in the training loss, not in f

    def __init__(
        self,
        temperature: Temperature = 0.07,
        context_size: int = 300,
        embed: Embed | None = None,
        normalize: bool = True,
        tolerance: float = 1e-3,
    ) -> None:
        context_size = integer("context_size", context_size)
        require_bool("normalize", normalize)
        if context_size < 2:
            raise ValueError(f"expected context_size of at least 2, a pair and a negative, received {context_size}")
        if not callable(temperature) and not (isinstance(temperature, (Real, Tensor)) and 0 < temperature < math.inf):
            raise ValueError(f"expected a positive temperature, received {temperature!r}")
        self.temperature = temperature
        self.context_size = context_size
        self.embed = embed
        self.normalize = normalize
        self.tolerance = tolerance
        self._bank: tuple[Tensor, Tensor] | None = None

    def output(self, module: nn.Module, batch: Any) -> Tensor:
        """The margin of each pair against the bank, shape ``(batch,)``.

        Raises:
            RuntimeError: if no bank has been installed by :meth:`set_context`.
            ValueError: if the embeddings do not have the shape of the bank's.
        """
        if self._bank is None:
            raise RuntimeError(
                "ContrastiveMargin has no bank of negatives; call set_context(make_context(module, batches)) with"
                f" batches of {self.context_size} training pairs at each checkpoint"
            )
        first, second = self._embed(module, batch)
        bank_first, bank_second = (bank.to(device=first.device, dtype=first.dtype) for bank in self._bank)
        if first.shape[1] != bank_first.shape[1]:
            raise ValueError(
                f"expected embeddings of dimension {bank_first.shape[1]}, as in the bank, received {first.shape[1]};"
                " make the context anew with this model"
            )
        itself = self._equal(first, bank_first) & self._equal(second, bank_second)
        alone = itself.all(-1, keepdim=True)
        masked = itself & ~alone  # where all is masked, gradients would be zero rather than NaN
        temperature = self.temperature(module) if callable(self.temperature) else self.temperature
        own = (first * second).sum(-1, keepdim=True)
        with torch.autocast(first.device.type, enabled=False):  # T magnifies the rounding of these products
            similarities = first @ bank_second.T, second @ bank_first.T
        margins = [
            -((similarity - own) / temperature).masked_fill(masked, -torch.inf).logsumexp(-1)
            for similarity in similarities
        ]
        return (margins[0] + margins[1]) * nan_unless(~alone.squeeze(-1))

    def loss(self, output: Tensor) -> Tensor:
        """The sum of both directions' cross-entropies at equal margins, shape ``(batch,)``."""
        return 2 * logistic_loss(output / 2)

    def make_context(self, module: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
        """Embed training pairs for the bank.

        Args:
            module: the model at this checkpoint, in eval mode.
            batches: batches of training pairs, drawn with equal chances.

        Returns:
            ``first`` and ``second``, each of shape ``(pairs, dim)``, on the model's device, without a graph.
        """
        # Outside inference mode: autograd saves the bank when outputs are differentiated.
        with torch.inference_mode(False), torch.no_grad():
            pairs = [self._embed(module, batch) for batch in batches]
            if not pairs:
                raise ValueError(f"expected batches of {self.context_size} training pairs for the bank, received none")
            firsts, seconds = zip(*pairs, strict=True)
            return {"first": torch.cat(firsts), "second": torch.cat(seconds)}

    def set_context(self, context: dict[str, Tensor]) -> None:
        """Install a bank, in place of an earlier one.

        Raises:
            ValueError: if ``context`` is not what :meth:`make_context` returns, or holds fewer than two pairs.
        """
        if set(context) != {"first", "second"}:
            raise ValueError(f"expected a context with 'first' and 'second', received {sorted(context)}")
        first, second = context["first"], context["second"]
        if first.ndim != 2 or first.shape != second.shape or first.shape[0] < 2:
            raise ValueError(
                "expected two or more pairs of embeddings, both of one shape (pairs, dim), received"
                f" {tuple(first.shape)} and {tuple(second.shape)}"
            )
        self._bank = first.detach(), second.detach()

    def _embed(self, module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        result = call_module(module, batch) if self.embed is None else self.embed(module, batch)
        found: list[Any]
        if isinstance(result, Mapping):
            found = [result.get("image_embeds"), result.get("text_embeds")]
        elif isinstance(result, (tuple, list)):
            found = list(result)
        else:
            found = [getattr(result, name, None) for name in ("image_embeds", "text_embeds")]
        if len(found) != 2 or not all(isinstance(item, Tensor) for item in found):
            raise TypeError(
                f"expected a pair of embeddings, or image_embeds and text_embeds, from {type(module).__name__},"
                f" received a {type(result).__name__}; pass embed=, a function of (module, batch) that returns the pair"
            )
        first, second = found
        if first.ndim != 2 or first.shape != second.shape:
            raise ValueError(
                "expected two embeddings of one shape (batch, dim), received"
                f" {tuple(first.shape)} and {tuple(second.shape)}"
            )
        dtype = torch.promote_types(first.dtype, torch.float32)
        first, second = first.to(dtype), second.to(dtype)
        return (F.normalize(first, dim=-1), F.normalize(second, dim=-1)) if self.normalize else (first, second)

    def _equal(self, embeddings: Tensor, bank: Tensor) -> Tensor:
        """Whether each embedding is each bank entry, up to rounding; shape ``(batch, pairs)``."""
        embeddings = embeddings.detach()
        # Not by matrix products, whose cancellation error is as large as the tolerance.
        distances = torch.cdist(embeddings, bank, compute_mode="donot_use_mm_for_euclid_dist")
        scale: Tensor = embeddings.norm(dim=-1, keepdim=True)
        return distances <= self.tolerance * scale
