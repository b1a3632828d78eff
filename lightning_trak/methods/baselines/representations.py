"""Representations: the input of one layer, as a vector for each example."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypedDict

import lightning as L
import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_trak.checkpoints.copies import copy_module, load_each
from lightning_trak.checkpoints.names import canonical_name
from lightning_trak.checkpoints.of_model import checkpoints_of
from lightning_trak.checkpoints.reading import CheckpointsLike, masks_of
from lightning_trak.compatibility import original_module
from lightning_trak.methods.base import MatrixMethod
from lightning_trak.methods.examples import Examples, declared_rows
from lightning_trak.outputs.batches import LABELS_KEYS, Forward, LabelsKey, as_keys, one_per_example, split_labels

Pool = Callable[[Tensor, Any], Tensor]


class RepresentationOptions(TypedDict, total=False):
    """Keyword arguments of every method that compares representations, see :class:`RepresentationMethod`."""

    layer: str | None
    forward: Forward | None
    pool: Pool | None
    labels_key: LabelsKey
    weights_only: bool


class RepresentationMethod(MatrixMethod):
    """Base of the methods that compare representations: the input of one layer, as a vector for each example.

    Args:
        model: the trained model, which is never touched.
        checkpoints: as for :class:`~lightning_trak.TRAK`; scores are averaged over them.
        layer: name of a module, called once in a forward pass, whose first input is taken. Default: the last one, in
            the order of ``model.named_modules()``, with parameters of its own. In most models it is the head, and its
            input is the penultimate activations.
        forward: ``(module, batch) -> anything``, runs the model on a batch. Default: as the model's declared output
            does (:class:`~lightning_trak.AttributionMixin`).
        pool: ``(activations, batch) -> (batch, width)``; default: :func:`mean_pool`.
        labels_key: where the labels are, if they are needed and batches are not tuples ``(inputs, ..., labels)``: a key
            or attribute, a position in a tuple, or a function of the batch.
        weights_only: ``False`` lets ``.ckpt`` and ``.pt`` files run code when they are read; for files you trust only.
    """

    _shown = ("model", "checkpoints", "layer", "similarity", "k")

    def __init__(
        self,
        model: nn.Module,
        checkpoints: CheckpointsLike | None = None,
        *,
        layer: str | None = None,
        forward: Forward | None = None,
        pool: Pool | None = None,
        labels_key: LabelsKey = LABELS_KEYS,
        weights_only: bool = True,
    ) -> None:
        self.model = original_module(model)
        self.checkpoints = checkpoints_of(self.model, checkpoints, weights_only)
        for name, function in (("forward", forward), ("pool", pool)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be a function, got {function!r:.80}")
        self.layer = layer
        self.forward: Forward = forward or declared_rows(self.model, "pass forward=")
        self.pool = pool or mean_pool
        self.labels_keys = as_keys(labels_key)

    @property
    @override
    def used_masks(self) -> Tensor | None:
        return masks_of(self.checkpoints)

    def represent(self, trainer: L.Trainer, *data: Examples) -> Iterator[tuple[Tensor, ...]]:
        """Representations of each dataset, ``(num_examples, width)`` in at least float32, a checkpoint at a time.

        They are computed in the precision of the weights: float32 under ``"bf16-mixed"``, bfloat16 under
        ``"bf16-true"``.
        """
        module = copy_module(self.model)
        layer = _find_layer(module, self.layer)

        def rows(module: nn.Module, batch: Any) -> Tensor:
            activations = capture_input(module, layer, lambda: self.forward(module, batch))
            pooled = self.pool(activations, batch)
            return pooled.to(torch.promote_types(pooled.dtype, torch.float32))

        for checkpoint in load_each(module, self.checkpoints):
            what = f"the representation at {checkpoint.name}"
            yield tuple(examples.map(trainer, module, rows, what, self.model) for examples in data)

    def labels(self, trainer: L.Trainer, examples: Examples) -> Tensor:
        """The label of each example, ``(num_examples,)``."""
        # The transfer hooks of the module may make the labels.
        return examples.map(trainer, copy_module(self.model), self._labels, "the label")

    def _labels(self, _: nn.Module, batch: Any) -> Tensor:
        _, labels = split_labels(batch, self.labels_keys)
        if labels.is_floating_point() and labels.dtype.itemsize < 4:
            raise ValueError(
                f"the labels are {labels.dtype}, as the Trainer's precision makes them, in which different labels may"
                " become equal: give them as integers, or use a Trainer of another precision"
            )
        if labels.is_floating_point() and bool((labels != labels.round()).any()):
            raise ValueError(
                "the labels are real numbers, which are equal by chance alone: similar examples are compared by their"
                " classes; name the classes with labels_key=, such as a function of the batch"
            )
        return one_per_example("labels", labels, "similar examples are compared by one label each")


def mean_pool(activations: Tensor, batch: Any) -> Tensor:
    """One vector per example.

    Args:
        activations: shape ``(batch, width)``, taken as they are; ``(batch, length, width)``, averaged over the
            positions that the batch's ``attention_mask`` holds, or all if the batch has none; or, of images and the
            like, more dimensions, strung together.
        batch: the batch, whose ``attention_mask`` is of shape ``(batch, length)``.

    Returns:
        Shape ``(batch, width)``.

    Raises:
        ValueError: if the mask does not fit.
    """
    if activations.ndim != 3:
        return activations.reshape(len(activations), -1)
    mask: Tensor | None = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if mask is None:
        return activations.mean(1)
    if mask.shape != activations.shape[:2]:
        raise ValueError(
            f"the layer's input has shape {tuple(activations.shape)}, for which attention_mask should have shape"
            f" {tuple(activations.shape[:2])}, not {tuple(mask.shape)}; say how to reduce it with pool=, a function of"
            " (activations, batch)"
        )
    weights = mask.to(activations).unsqueeze(-1)
    return (activations * weights).sum(1) / weights.sum(1)


def capture_input(module: nn.Module, layer: str, run: Callable[[], Any]) -> Tensor:
    """The first tensor that a layer is given while ``run`` calls the model.

    Raises:
        ValueError: if the layer is not called exactly once, or not on a tensor.
    """
    captured: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensor = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if tensor is None:
            raise ValueError(f"layer {layer!r} is called without a tensor; name another with layer=")
        captured.append(tensor.detach().clone())  # later layers may change it in place

    handle = module.get_submodule(layer).register_forward_pre_hook(note, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    if len(captured) != 1:
        raise ValueError(
            f"layer {layer!r} is called {len(captured)} times in a forward pass; name one that is called once with"
            " layer="
        )
    return captured[0]


def _find_layer(module: nn.Module, layer: str | None) -> str:
    """The layer's name in this module, parts of which may have been compiled."""
    if layer is None:
        owners = [name for name, part in module.named_modules() if any(True for _ in part.parameters(recurse=False))]
        if not owners:
            raise ValueError(f"{type(module).__name__} has no parameters; name a layer with layer=")
        return str(owners[-1])
    names: dict[str, str] = {canonical_name(name): name for name, _ in module.named_modules()}
    if layer not in names:
        raise ValueError(f"layer={layer!r} is no module of the model, which has: {', '.join(filter(None, names))}")
    return names[layer]
