"""An item of a dataset as a text and as an image, whatever its type."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MOST_LABELS = 100  # of an item: a longer vector of zeros and ones is data


def describe_item(item: Any, shapes: bool = True) -> str:
    """The strings and numbers in an item, such as ``"label: 3"``. If it holds none, the shapes of its arrays.

    If the last element of a tuple or list is a number, it is taken for the label; zeros and ones are taken for several.

    Args:
        item: of a dataset, before collation.
        shapes: whether shapes are given; beside an image they say nothing.
    """
    fields = _fields(item)
    texts = [(name, text) for name, value in fields if (text := _text_of(name, value)) is not None]
    if not texts and shapes:
        texts = [(name, _shape(value)) for name, value in fields]
    return ", ".join(f"{name}: {text}" if name else text for name, text in texts)


def item_text(item: Any) -> str | None:
    """What :func:`describe_item` says of an item that holds a string; None if it holds none."""
    return describe_item(item) if any(isinstance(value, str) for _, value in _fields(item)) else None


def item_label(item: Any) -> int | float | str | None:
    """The label of an item; None if it has none.

    It is what a mapping has under ``"label"`` or ``"labels"``, or the last element of a tuple or list, if that is a
    number, or a vector of zeros and ones: then the label is the positions of the ones, as in ``"0 3"``. In a mapping it
    may be a string.

    Args:
        item: of a dataset, before collation.
    """
    if isinstance(item, Mapping):
        named = item.get("label", item.get("labels"))
        return named if isinstance(named, str) else _label(named)
    return _label(item[-1]) if isinstance(item, (tuple, list)) and len(item) > 1 else None


def find_image(item: Any) -> Tensor | None:
    """The first image in an item: a PIL image, or an array of bytes or floats with the shape of an image.

    If some floats are outside [0, 1], as they are after normalisation, all are shifted and scaled to fill [0, 1].

    Args:
        item: of a dataset, before collation.

    Returns:
        float32 in [0, 1], ``(height, width)`` or ``(3, height, width)``. None if the item holds no image.
    """
    return next((image for _, value in _fields(item) if (image := _image(value)) is not None), None)


def _fields(item: Any) -> list[tuple[str, Any]]:
    if isinstance(item, Mapping):
        return [(str(name), value) for name, value in item.items()]
    if not isinstance(item, (tuple, list)):
        return [("", item)]
    *rest, last = item
    if rest and _label(last) is not None:
        return [("label" if _number(last) is not None else "labels", last), *(("", value) for value in rest)]
    return [("", value) for value in item]


def _text(value: Any) -> str | None:
    """A string or a single number as a text; None for anything else."""
    if isinstance(value, str):
        return " ".join(value.split())
    number = _number(value)
    return f"{number:g}" if isinstance(number, float) else None if number is None else str(number)


def _text_of(name: str, value: Any) -> str | None:
    """As :func:`_text`; several labels, too."""
    text = _text(value)
    return _several(value) if text is None and name in ("label", "labels") else text


def _label(value: Any) -> int | float | str | None:
    number = _number(value)
    return _several(value) if number is None else number


def _several(value: Any) -> str | None:
    """The positions of the ones among a few zeros and ones, as a text; None for anything else."""
    if not isinstance(value, (Tensor, np.ndarray)) or value.ndim != 1 or not 1 < len(value) <= _MOST_LABELS:
        return None
    labels = torch.as_tensor(value)
    if not bool(((labels == 0) | (labels == 1)).all()):
        return None
    return " ".join(str(position) for position in labels.nonzero().flatten().tolist()) or "none"


def _number(value: Any) -> int | float | None:
    """A single number; None for anything else."""
    if isinstance(value, (Tensor, np.ndarray, np.generic)) and value.shape in ((), (1,)):
        value = value.item()
    return value if isinstance(value, (int, float)) else None


def _shape(value: Any) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{value.dtype} {tuple(value.shape)}".removeprefix("torch.")
    if _is_picture(value):
        return f"image {value.width} x {value.height}"
    return type(value).__name__ + (f" of {len(value)}" if hasattr(value, "__len__") else "")


def _is_picture(value: Any) -> bool:
    """Whether it is a PIL image. Pillow need not be installed."""
    return hasattr(value, "convert") and hasattr(value, "mode")


def _image(value: Any) -> Tensor | None:
    if _is_picture(value):
        value = np.array(value.convert("L" if value.mode in ("1", "L") else "RGB"))
    if not isinstance(value, (Tensor, np.ndarray)):
        return None
    image = torch.as_tensor(value).detach().cpu()
    if not image.is_floating_point() and image.dtype != torch.uint8:
        return None
    if image.ndim == 3 and image.shape[0] not in (1, 3) and image.shape[2] in (1, 3):
        image = image.permute(2, 0, 1)
    if image.ndim == 3 and image.shape[0] == 1:
        image = image[0]
    if min(image.shape, default=0) < 2 or not (image.ndim == 2 or (image.ndim == 3 and len(image) == 3)):
        return None
    if image.dtype == torch.uint8:
        return image.float() / 255
    image = image.float().nan_to_num()
    low, high = float(image.min()), float(image.max())
    return image if low >= 0 and high <= 1 else (image - low) / max(high - low, 1e-12)
