"""Batches and model results in the shapes that users and Hugging Face give them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from lightning_trak.checks import is_integer
from lightning_trak.texts.printable import printable

Forward = Callable[[nn.Module, Any], Any]
Find = Callable[[Any], Tensor]
Key = int | str | Find
LabelsKey = int | str | tuple[Key, ...] | Find  # in this order a command line can tell them apart

LABELS_KEYS = ("labels", "label")


def as_keys(labels_key: LabelsKey) -> tuple[Key, ...]:
    """The candidate keys as a tuple.

    Raises:
        TypeError: if one is neither a text, a position nor a function.
    """
    keys = labels_key if isinstance(labels_key, (tuple, list)) else (labels_key,)
    return tuple(_checked(key) for key in keys)


def _checked(key: Any) -> Key:
    if isinstance(key, str) or callable(key):
        return cast(Key, key)
    if is_integer(key):
        return operator.index(key)
    raise TypeError(
        "expected labels_key as a key or attribute, a position in a tuple, or a function of the batch, received"
        f" {key!r}"
    )


_UNLABELLED = (
    '; for targets without labels, a classifier takes output=ClassificationMargin(labels="predicted"), a regression any'
    " number as the label, and a method that compares representations forward="
)


def split_labels(batch: Any, labels_keys: tuple[Key, ...]) -> tuple[Any, Tensor]:
    """Take the labels out of a batch.

    Args:
        batch: a tuple or list, of which the labels are the last element unless a position says otherwise; a mapping
            with one of ``labels_keys``, or another object with one of them as an attribute.
        labels_keys: candidate keys; the first one that the batch has is used. A function returns the labels.

    Returns:
        The rest of the batch, for :func:`call_module`, and the labels. The rest is None if a function returned labels
        that are not an element of the batch.

    Raises:
        ValueError: if a mapping has none of the keys, or a sequence has fewer than two elements or not that position.
        TypeError: if the batch is of another kind, or the labels are not a tensor.
    """
    if isinstance(batch, (tuple, list)) and len(batch) < 2 and not any(map(callable, labels_keys)):
        raise ValueError(
            f"expected a batch (inputs, ..., labels), received a {type(batch).__name__} of {len(batch)}{_UNLABELLED}"
        )
    key = next((key for key in labels_keys if has_key(batch, key)), None)
    if key is None and isinstance(batch, (tuple, list)) and not any(isinstance(key, int) for key in labels_keys):
        key = -1
    if key is None:
        raise _without(batch, labels_keys)
    inputs: Any
    if callable(key):
        labels = key(batch)
        inputs = _rest(batch, labels)
    elif isinstance(batch, Mapping):
        inputs, labels = {name: value for name, value in batch.items() if name != key}, batch[key]
    elif isinstance(batch, (tuple, list)):
        place = range(len(batch))[key] if isinstance(key, int) else batch._fields.index(key)  # type: ignore[union-attr]
        inputs, labels = (*batch[:place], *batch[place + 1 :]), batch[place]
    else:
        inputs, labels = batch, getattr(batch, str(key))
    if not isinstance(labels, Tensor):
        raise TypeError(f"expected the labels as a Tensor, received a {type(labels).__name__}: change the collate_fn")
    return inputs, labels


def without_labels(batch: Any, labels_keys: tuple[Key, ...]) -> Any:
    """What the module takes of a batch whose labels are not used, or that has none.

    Args:
        batch: a tensor, a tuple of one element, or a mapping without labels, which the module takes as they are; else
            as for :func:`split_labels`.
        labels_keys: as for :func:`split_labels`; empty: the batch has no labels.

    Raises:
        ValueError: if what would be left out are not labels, one for each example.
    """
    if not has_labels(batch, labels_keys):
        return batch
    inputs, labels = split_labels(batch, labels_keys)
    if labels.ndim > 2 or (labels.ndim == 2 and labels.shape[1] != 1):
        raise ValueError(
            f"a tensor of shape {tuple(labels.shape)} stands where the batch should have its labels, one for each"
            " example: say with labels_key= where they are, or labels_key=None if the batch has none"
        )
    return inputs


def has_labels(batch: Any, labels_keys: tuple[Key, ...]) -> bool:
    """Whether a batch has labels. Of a tuple of several elements, the last one counts as such.

    Args:
        batch: as for :func:`without_labels`.
        labels_keys: as for :func:`without_labels`.
    """
    if isinstance(batch, Tensor) or not labels_keys:
        return False
    if isinstance(batch, (tuple, list)):
        return len(batch) != 1
    return any(has_key(batch, key) for key in labels_keys)


def has_key(batch: Any, key: Key) -> bool:
    """Whether a batch has labels under a key; a function finds them in any."""
    if callable(key):
        return True
    if isinstance(batch, Mapping):
        return key in batch
    if isinstance(batch, (tuple, list)):
        return -len(batch) <= key < len(batch) if isinstance(key, int) else key in getattr(batch, "_fields", ())
    return isinstance(key, str) and hasattr(batch, key) and not isinstance(batch, Tensor)


def _rest(batch: Any, labels: Any) -> Any:
    """A batch without the element that is the labels; None if none is."""
    if isinstance(batch, Mapping):
        rest: Any = {name: value for name, value in batch.items() if value is not labels}
    elif isinstance(batch, (tuple, list)):
        rest = tuple(value for value in batch if value is not labels)
    else:
        return batch
    return rest if len(rest) < len(batch) else None


def _without(batch: Any, keys: tuple[Key, ...]) -> Exception:
    if isinstance(batch, Mapping):
        return ValueError(
            f"expected the labels under {_either(keys)} in the batch, received the keys"
            f" {', '.join(printable(str(name)) for name in batch)}; name the right one with labels_key={_UNLABELLED}"
        )
    if isinstance(batch, (tuple, list)):
        return ValueError(
            f"expected the labels at position {_either(keys)} of the batch, received a {type(batch).__name__} of"
            f" {len(batch)}; positions count from 0, or from the end as -1"
        )
    return TypeError(
        f"expected a batch (inputs, ..., labels), or a mapping or object with {_either(keys)}, received a"
        f" {type(batch).__name__}"
    )


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
            " (module, batch) that makes the call: if it takes the whole batch, lambda module, batch: module(batch)"
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
        inputs: the batch without its labels; None if only ``forward`` can tell.
        forward: the user's way to call the model.

    Returns:
        The result if it is a tensor, else its ``logits`` item or attribute, else its first element.

    Raises:
        TypeError: if the result holds no such tensor, or nothing says how to call the module.
    """
    if forward is None and inputs is None:
        raise TypeError(
            "labels_key= is a function that returns something else than an element of the batch, so that it is not"
            f" known what {type(module).__name__} takes: pass forward= too, a function of (module, batch) that makes"
            " the call"
        )
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


def _either(keys: tuple[Key, ...]) -> str:
    return " or ".join(repr(key) for key in keys)
