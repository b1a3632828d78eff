"""A digest of the content of any Python value."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def content_digest(value: Any) -> str:
    """SHA-256 over a value's types, structure and content. Equal values have equal digests in every process.

    For tensors and arrays, dtype, shape and bytes count. For mappings and sets, the order does not count. For other
    objects, the class and what pickle would save count. If an object cannot be pickled, only its class counts.
    """
    return _digest(value, {}).hex()


def _digest(value: Any, within: dict[int, int]) -> bytes:
    """A digest of a value inside other values.

    Args:
        value: the value.
        within: the ids of the values around it, with their depths. A cycle ends at one of them.
    """
    if id(value) in within:
        return _hash("above", str(len(within) - within[id(value)]))
    leaf = _leaf(value)
    if leaf is not None:
        return _hash(*leaf)
    within[id(value)] = len(within)
    try:
        return _hash(*_parts(value, within))
    finally:
        del within[id(value)]


def _hash(kind: str, *parts: bytes | str) -> bytes:
    digest = hashlib.sha256()
    for part in (kind, *parts):
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))  # different lists of parts then give different bytes
        digest.update(data)
    return digest.digest()


def _leaf(value: Any) -> tuple[str | bytes, ...] | Any:
    """Kind and content of a value without parts; None if it has parts."""
    if value is None or type(value) in (bool, int, float, complex, str):
        return type(value).__name__, value if isinstance(value, str) else repr(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return "bytes", bytes(value)
    if isinstance(value, (type, torch.dtype, torch.device)) or type(value).__name__ in _FUNCTIONS:
        return "name", _name(value)
    if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested and not value.is_quantized:
        plain = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        return "tensor", json.dumps([str(plain.dtype), list(plain.shape)]), _bytes(plain)
    if isinstance(value, (np.ndarray, np.generic)) and not value.dtype.hasobject:
        return "array", json.dumps([_dtype(value.dtype), list(value.shape)]), value.tobytes()
    return None


_FUNCTIONS = ("function", "builtin_function_or_method", "method_descriptor", "wrapper_descriptor", "ufunc")


def _bytes(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def _dtype(dtype: np.dtype[Any]) -> str:
    return str(dtype.descr if dtype.names else dtype.str)


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value)}"


def _parts(value: Any, within: dict[int, int]) -> tuple[str | bytes, ...] | Any:
    def each(values: Any) -> list[bytes]:
        return [_digest(item, within) for item in values]

    if isinstance(value, Mapping):
        return "mapping", *sorted(key + item for key, item in (each(pair) for pair in value.items()))
    if isinstance(value, (set, frozenset)):
        return "set", *sorted(each(value))
    if isinstance(value, (list, tuple)):
        return _name(type(value)), *each(value)
    if isinstance(value, Tensor):
        return "tensor", str(value.dtype), *each(_dense(value))
    if isinstance(value, np.ndarray):  # of objects
        return "objects", str(value.shape), *each(value.ravel().tolist())
    try:
        state = value.__reduce_ex__(2)
    except Exception:  # objects of the user may raise anything
        return "unseen", _name(type(value))
    if isinstance(state, str):
        return "global", state
    made, arguments, kept, items, pairs = (*state, None, None, None)[:5]
    return "object", _name(type(value)), *each([made, arguments, kept, list(items or ()), list(pairs or ())])


def _dense(tensor: Tensor) -> list[Any]:
    """A nested, quantized or sparse tensor as strided tensors and plain values."""
    tensor = tensor.detach().cpu()
    if tensor.is_nested:
        return [*tensor.unbind()]
    if tensor.is_quantized:
        return [tensor.dequantize(), str(tensor.qscheme())]
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        return [list(tensor.shape), tensor.indices(), tensor.values()]
    return [str(tensor.layout), tensor.to_dense()]
