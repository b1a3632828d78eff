"""Directories with the weights of an adapter alone, as PEFT and the Trainer of Hugging Face save them."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_trak import TRAK
from lightning_trak.checkpoints.copies import load_each
from lightning_trak.checkpoints.of_model import checkpoints_of
from lightning_trak.outputs import CausalLMMargin

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = torch.randint(0, 30, (8, 5), generator=torch.Generator().manual_seed(0))
KINDS = {
    "lora": peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    "dora": peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM"),
    "whole_head": peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
    "biases": peft.LoraConfig(r=2, target_modules=["q_proj"], bias="all", task_type="CAUSAL_LM"),
    "ia3": peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
}


def base() -> nn.Module:
    sizes = {"vocab_size": 30, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "attention_bias": True}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))


def tuned(config: Any = KINDS["lora"]) -> Any:
    """A model with adapters that act: those of LoRA begin as zero."""
    model = peft.get_peft_model(base(), copy.deepcopy(config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return model


def loaded(model: nn.Module, directory: Path) -> dict[str, torch.Tensor]:
    """The weights of a copy of the model after loading the only checkpoint in a directory."""
    copied = copy.deepcopy(model)
    (_,) = load_each(copied, checkpoints_of(copied, directory))
    return copied.state_dict()


class Holder(L.LightningModule):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hold", [lambda network: network, Holder])
def test_an_adapter_is_loaded_into_the_model(tmp_path: Path, kind: str, hold: Any) -> None:
    model = tuned(KINDS[kind])
    model.save_pretrained(tmp_path)
    expected = copy.deepcopy(hold(model).state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    found = loaded(hold(model), tmp_path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_scores_are_those_of_the_whole_weights(tmp_path: Path) -> None:
    model = tuned()
    states = []
    for step in (500, 1000):
        model.save_pretrained(tmp_path / "run" / f"checkpoint-{step}")
        states.append(copy.deepcopy(model.state_dict()))
        model.load_state_dict({name: 0.9 * tensor if "lora" in name else tensor for name, tensor in states[-1].items()})
    options: dict[str, Any] = {"output": CausalLMMargin(), "parameters": "*lora*"}
    rows = torch.utils.data.DataLoader(IDS, batch_size=4)
    by_folder = TRAK(model, tmp_path / "run", tmp_path / "folders", **options)
    by_state = TRAK(model, states, tmp_path / "states", **options)
    assert torch.equal(by_folder.attribute(None, rows, rows), by_state.attribute(None, rows, rows))


def test_another_base_model_needs_another_store(tmp_path: Path) -> None:
    model = tuned()
    model.save_pretrained(tmp_path / "adapter")
    rows = torch.utils.data.DataLoader(IDS, batch_size=4)
    TRAK(model, tmp_path / "adapter", tmp_path / "store", output=CausalLMMargin()).featurize(None, rows)
    other = peft.PeftModel.from_pretrained(base(), tmp_path / "adapter", is_trainable=True)
    trak = TRAK(other, tmp_path / "adapter", tmp_path / "store", output=CausalLMMargin())
    with pytest.raises(RuntimeError, match="whose weights or buffers it does not have"):
        trak.score(None, rows)


def test_a_model_without_an_adapter_is_refused(tmp_path: Path) -> None:
    tuned().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds an adapter alone, and LlamaForCausalLM has no adapter of PEFT"):
        loaded(base(), tmp_path)


def test_an_adapter_of_another_strength_is_refused(tmp_path: Path) -> None:
    tuned().save_pretrained(tmp_path)
    other = peft.LoraConfig(r=2, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="lora_alpha is 8 there and 32 in the model"):
        loaded(tuned(other), tmp_path)


def test_an_adapter_of_other_layers_is_refused(tmp_path: Path) -> None:
    tuned(KINDS["whole_head"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not fit the adapter 'default' of PeftModelForCausalLM: it lacks"):
        loaded(tuned(), tmp_path)


def test_a_prompt_is_refused(tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    model = tuned(config)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has prompt_embeddings, which the model does not have"):
        loaded(model, tmp_path)
