"""Batches and model results in the shapes that users and Hugging Face give them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

Forward = Callable[[nn.Module, Any], Any]
LabelsKey = str | tuple[str, ...]

LABELS_KEYS = ("labels", "label")


def as_keys(labels_key: LabelsKey) -> tuple[str, ...]:
    """The candidate keys as a tuple."""
    return (labels_key,) if isinstance(labels_key, str) else tuple(labels_key)


def split_labels(batch: Any, labels_keys: tuple[str, ...]) -> tuple[Any, Tensor]:
    """Take the labels out of a batch.

    Args:
        batch: a tuple or list whose last element is the labels, a mapping with one of ``labels_keys``, or another
            object with one of them as an attribute.
        labels_keys: candidate keys; the first one that the batch has is used.

    Returns:
        The rest of the batch, for :func:`call_module`, and the labels.

    Raises:
        ValueError: if a mapping has none of the keys, or a sequence has fewer than two elements.
        TypeError: if the batch is of another kind, or the labels are not a tensor.
    """
    inputs: Any
    if isinstance(batch, Mapping):
        key = next((key for key in labels_keys if key in batch), None)
        if key is None:
            raise ValueError(
                f"expected the labels under {_either(labels_keys)} in the batch, received the keys"
                f" {', '.join(map(str, batch))}; name the right one with labels_key="
            )
        inputs, labels = {name: value for name, value in batch.items() if name != key}, batch[key]
    elif isinstance(batch, (tuple, list)):
        if len(batch) < 2:
            raise ValueError(
                f"expected a batch (inputs, ..., labels), received a {type(batch).__name__} of {len(batch)}"
            )
        inputs, labels = tuple(batch[:-1]), batch[-1]
    else:
        key = next((key for key in labels_keys if hasattr(batch, key)), None)
        if key is None or isinstance(batch, Tensor):
            raise TypeError(
                f"expected a batch (inputs, ..., labels), or a mapping or object with {_either(labels_keys)}, received"
                f" a {type(batch).__name__}"
            )
        inputs, labels = batch, getattr(batch, key)
    if not isinstance(labels, Tensor):
        raise TypeError(f"expected the labels as a Tensor, received a {type(labels).__name__}: change the collate_fn")
    return inputs, labels


def call_module(module: nn.Module, inputs: Any) -> Any:
    """Call the module on a mapping's items as keywords, on a tuple's or list's elements in order, or on a tensor."""
    try:
        if isinstance(inputs, Mapping):
            return module(**inputs)
        if isinstance(inputs, (tuple, list)):
            return module(*inputs)
        if isinstance(inputs, Tensor):
            return module(inputs)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise TypeError(
            f"{error}: the batch holds other things than {type(module).__name__} takes; pass forward=, a function of"
            " (module, batch) that makes the call"
        ) from error
    raise TypeError(
        f"cannot tell how to call {type(module).__name__} on a {type(inputs).__name__}; expected a tuple, list, mapping"
        " or Tensor: pass forward=, a function of (module, batch) that makes the call"
    )


def predict(module: nn.Module, batch: Any, inputs: Any, forward: Forward | None) -> Tensor:
    """The model's logits: by ``forward(module, batch)`` if given, else by calling the module on ``inputs``.

    Args:
        module: the model.
        batch: the whole batch.
        inputs: the batch without its labels.
        forward: the user's way to call the model.

    Returns:
        The result if it is a tensor, else its ``logits`` item or attribute, else its first element.

    Raises:
        TypeError: if the result holds no such tensor.
    """
    result = call_module(module, inputs) if forward is None else forward(module, batch)
    found = result
    if isinstance(result, Mapping):
        found = result.get("logits")
    elif hasattr(result, "logits"):
        found = result.logits
    elif isinstance(result, (tuple, list)) and result:
        found = result[0]
    if not isinstance(found, Tensor):
        raise TypeError(
            f"{type(module).__name__} returned a {type(result).__name__} without logits; expected a Tensor, an object"
            " or mapping with 'logits', or a tuple that begins with them: pass forward=, a function of (module, batch)"
        )
    return found


def one_per_example(name: str, value: Tensor, advice: str) -> Tensor:
    """``value`` of shape ``(batch,)`` or ``(batch, 1)`` as ``(batch,)``; any other shape is a ValueError."""
    if value.ndim == 1:
        return value
    if value.ndim == 2 and value.shape[1] == 1:
        return value.squeeze(1)
    raise ValueError(f"expected {name} of shape (batch,) or (batch, 1), received {tuple(value.shape)}; {advice}")


def _either(keys: tuple[str, ...]) -> str:
    return " or ".join(repr(key) for key in keys)
