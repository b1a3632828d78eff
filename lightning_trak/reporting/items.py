"""What an item of any dataset is, as a text and as an image."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def describe_item(item: Any) -> str:
    """What strings and numbers an item holds, such as ``"label: 3"``; else the shapes of its arrays.

    The last element of a tuple or list is taken for the label if it is a number.
    """
    fields = _fields(item)
    said = [(name, text) for name, value in fields if (text := _text(value)) is not None]
    if not said:
        said = [(name, _shape(value)) for name, value in fields]
    return ", ".join(f"{name}: {text}" if name else text for name, text in said)


def find_image(item: Any) -> Tensor | None:
    """The first image in an item: a PIL image, or an array of bytes or floats that is shaped like one.

    Floats outside [0, 1], as after normalisation, are stretched to it.

    Returns:
        float32 in [0, 1], ``(height, width)`` or ``(3, height, width)``; None if there is none.
    """
    return next((image for _, value in _fields(item) if (image := _image(value)) is not None), None)


def _fields(item: Any) -> list[tuple[str, Any]]:
    if isinstance(item, Mapping):
        return [(str(name), value) for name, value in item.items()]
    if not isinstance(item, (tuple, list)):
        return [("", item)]
    *rest, last = item
    if rest and _text(last) is not None and not isinstance(last, str):
        return [("label", last), *(("", value) for value in rest)]
    return [("", value) for value in item]


def _text(value: Any) -> str | None:
    """A string or a single number as a text."""
    if isinstance(value, str):
        return " ".join(value.split())
    if isinstance(value, (Tensor, np.ndarray, np.generic)) and value.shape in ((), (1,)):
        value = value.item()
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if isinstance(value, int) else None


def _shape(value: Any) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{value.dtype} {tuple(value.shape)}".removeprefix("torch.")
    if _is_picture(value):
        return f"image {value.width} x {value.height}"
    return type(value).__name__ + (f" of {len(value)}" if hasattr(value, "__len__") else "")


def _is_picture(value: Any) -> bool:
    """Whether it is a PIL image; the package need not be installed."""
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
