"""Checksums of weights, which tell checkpoints and modules apart."""

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_trak.checkpoints.names import canonical_name, named_tensors
from lightning_trak.compatibility import is_traceable_wrapper_subclass
from lightning_trak.running.fsdp import is_sharded
from lightning_trak.storage.files import tensor_digest


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over the weights of a checkpoint. It is the same for weights of the module and of a wrapper around it."""
    return tensor_digest({canonical_name(name): tensor for name, tensor in weights.items()})


def state_digest(module: nn.Module, given: Iterable[str] = ()) -> str:
    """SHA-256 over the present parameters and buffers, except those that a checkpoint replaces.

    This digest and that of the checkpoint together identify all tensors of the module after loading.

    Args:
        module: a copy of the user's module. If it is sharded, all ranks must call this.
        given: the names in the checkpoint.

    Returns:
        A digest that is the same for equal names, dtypes, shapes and bytes. A tied tensor counts under each of its
        names.

    Raises:
        ValueError: if a tensor has no content.
    """
    return _digest({name: tensor for name, (_, tensor) in named_tensors(module).items()}, given)


def frozen_digest(module: nn.Module, given: Iterable[str]) -> str:
    """SHA-256 over the parameters that a snapshot leaves out.

    Args:
        module: the module.
        given: the names in the snapshot.
    """
    parameters = module.named_parameters(remove_duplicate=False)
    return _digest({canonical_name(name): parameter for name, parameter in parameters}, given)


def _digest(tensors: Mapping[str, Tensor], given: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for name in sorted(set(tensors) - set(map(canonical_name, given))):
        parts = {f"{name}{suffix}": part for suffix, part in _plain(name, tensors[name].detach()).items()}
        digest.update(tensor_digest(parts).encode())
    return digest.hexdigest()


def _plain(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The plain tensors that make up a tensor of any kind, by the suffix that each adds to its name."""
    if tensor.is_meta:
        raise ValueError(f"{name} is on the meta device, without content")
    if is_sharded(tensor):
        return {"": tensor.full_tensor()}  # type: ignore[attr-defined]
    if is_traceable_wrapper_subclass(tensor):
        parts = {part: getattr(tensor, part) for part in tensor.__tensor_flatten__()[0]}
    elif tensor.is_quantized:
        parts = {"int": tensor.int_repr(), "values": tensor.dequantize()}
    elif tensor.layout == torch.sparse_coo:
        whole = tensor.coalesce()
        parts = {"indices": whole.indices(), "values": whole.values()}
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = {"rows": tensor.crow_indices(), "columns": tensor.col_indices(), "values": tensor.values()}
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts = {"columns": tensor.ccol_indices(), "rows": tensor.row_indices(), "values": tensor.values()}
    else:
        return {"": tensor.resolve_conj().resolve_neg()}
    shape = f" {tensor.layout} {list(tensor.shape)} "
    return {
        f"{shape}{part}{suffix}": plain
        for part, value in parts.items()
        for suffix, plain in _plain(name, value).items()
    }
