"""Weights of an adapter alone, as PEFT saves them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_trak.checkpoints.base import Checkpoint
from lightning_trak.texts.messages import listed

# What decides how strongly an adapter acts, besides its weights.
_STRENGTH = ("peft_type", "r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora", "use_dora")


def adapter_under_own_names(checkpoint: Checkpoint, model: nn.Module) -> dict[str, Tensor]:
    """Read the weights of an adapter, and give them the names that they have in the model.

    Args:
        checkpoint: of an adapter alone.
        model: the user's model, which has that adapter.

    Raises:
        ValueError: if the model has no adapter of PEFT, several models with adapters, or another adapter.
    """
    prefix, tuned = _tuned(checkpoint.name, model)
    name = tuned.active_adapter
    _require_same_strength(checkpoint, tuned.peft_config[name].to_dict())
    own, saved = _saved_names(tuned, name)
    weights = checkpoint.load()
    unknown = [key for key in weights if key not in own]
    missing = [key for key in saved if key not in weights]
    if unknown or missing:
        what = f"lacks {listed(missing)}" if missing else f"has {listed(unknown)}, which the model does not have"
        raise ValueError(
            f"{checkpoint.name} does not fit the adapter {name!r} of {type(model).__name__}: it {what}; pass the model"
            " that was tuned, or copies of its state_dict() as checkpoints"
        )
    return {f"{prefix}{own[key]}": tensor for key, tensor in weights.items()}


def _tuned(name: str, model: nn.Module) -> tuple[str, Any]:
    """The part of the model that PEFT has wrapped, and what its names begin with."""
    found: list[tuple[str, Any]] = []
    if "peft" in sys.modules:  # or the model has no adapter
        from peft import PeftModel

        found = [(place, part) for place, part in model.named_modules() if isinstance(part, PeftModel)]
    if len(found) != 1:
        number = f"{len(found)} models with adapters" if found else "no adapter"
        raise ValueError(
            f"{name} holds an adapter alone, and {type(model).__name__} has {number} of PEFT: pass the model that was"
            " tuned, such as PeftModel.from_pretrained(base_model, directory), or copies of its state_dict() as"
            " checkpoints"
        )
    ((place, part),) = found
    return f"{place}." if place else "", part


def _require_same_strength(checkpoint: Checkpoint, own: Mapping[str, Any]) -> None:
    given = checkpoint.adapter or {}
    other = [key for key in _STRENGTH if key in given and key in own and given[key] != own[key]]
    if other:
        differences = listed([f"{key} is {given[key]!r} there and {own[key]!r} in the model" for key in other])
        raise ValueError(
            f"{checkpoint.name} is of an adapter with other settings than that of the model: {differences}; pass the"
            " model that was tuned"
        )


def _saved_names(tuned: Any, adapter: str) -> tuple[dict[str, str], list[str]]:
    """The model's name of each tensor by that under which PEFT saves it, and the names that PEFT always saves."""
    from peft import get_peft_model_state_dict

    tensors = tuned.state_dict(keep_vars=True)
    saved = get_peft_model_state_dict(tuned, tensors, adapter_name=adapter, save_embedding_layers=False)
    names = {id(tensor): name for name, tensor in tensors.items()}
    # Embeddings of a larger vocabulary are saved, too, under their own names.
    placed = {key: names[id(tensor)] for key, tensor in saved.items() if id(tensor) in names}
    return {name: name for name in tensors} | placed, list(saved)
