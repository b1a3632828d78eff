"""Weights under the model's own names, and the model's current weights."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_trak.checkpoints.copies import Original, copy_module
from lightning_trak.checkpoints.of_model import checkpoints_of
from tests.lit import make_model
from tests.snapshot_data import assert_equal, fill


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


class Wrapping(L.LightningModule):
    def __init__(self, *parts: str) -> None:
        super().__init__()
        for part in parts:
            setattr(self, part, Tied())


def test_current_weights_are_those_of_the_time_of_reading():
    model = nn.Linear(2, 1)
    (current,) = checkpoints_of(model, None)
    before = current.load()
    assert_equal(before, dict(model.state_dict()))
    with torch.no_grad():
        model.weight.add_(1)
    assert not torch.equal(before["weight"], model.weight)  # it was a copy
    assert_equal(current.load(), dict(model.state_dict()))


def test_current_weights_without_content_are_refused():
    with pytest.raises(TypeError, match=r"current weights must map names to dense tensors, .*meta device"):
        checkpoints_of(nn.Linear(2, 1, device="meta"), None)[0].load()
    with pytest.raises(ValueError, match="current weights is empty"):
        checkpoints_of(nn.ReLU(), None)[0].load()


def saved_part(folder: Path, seed: int = 3) -> tuple[Path, Tied]:
    """A model as Hugging Face saves it: under its own names, tied weights once."""
    torch.manual_seed(seed)
    part = Tied()
    save_file({"embedding.weight": part.embedding.weight.detach()}, folder / "model.safetensors", {"format": "pt"})
    return folder, part


def test_a_part_of_the_model_gets_the_names_of_the_whole(tmp_path):
    folder, part = saved_part(tmp_path)
    model = Wrapping("model")
    (found,) = checkpoints_of(model, folder)
    weights = found.load()
    assert set(weights) == {"model.embedding.weight", "model.head.weight"}
    copy = copy_module(model)
    Original(copy).load(weights, found.name)
    assert torch.equal(copy.model.head.weight, part.embedding.weight)
    assert not torch.equal(model.model.head.weight, part.embedding.weight)  # the user's model is left alone


def test_the_whole_model_keeps_its_names(tmp_path):
    model = make_model()
    torch.save(model.state_dict(), tmp_path / "a.pt")
    for source in (tmp_path / "a.pt", model.state_dict(), {"state_dict": model.state_dict()}):
        assert_equal(checkpoints_of(model, source)[0].load(), dict(model.state_dict()))
    fill(tmp_path / "run", (10,))
    assert checkpoints_of(model, tmp_path / "run")[0].record is not None


def test_weights_that_fit_two_parts_are_refused(tmp_path):
    folder, _ = saved_part(tmp_path)
    with pytest.raises(ValueError, match=r"fits several parts of Wrapping: teacher, student; .*teacher\.embedding"):
        checkpoints_of(Wrapping("teacher", "student"), folder)[0].load()


def test_shapes_tell_two_parts_apart(tmp_path):
    folder, _ = saved_part(tmp_path)
    model = Wrapping("teacher", "student")
    model.teacher.embedding = nn.Embedding(5, 7)
    assert "student.embedding.weight" in checkpoints_of(model, folder)[0].load()


def test_weights_that_fit_nowhere_keep_their_names_and_are_refused(tmp_path):
    model = Wrapping("model")
    weights = checkpoints_of(model, {"bert.weight": torch.ones(1)})[0].load()
    with pytest.raises(ValueError, match=r"does not fit Wrapping.*\n.*Missing keys: model\.e(.|\n)*bert\.weight"):
        Original(copy_module(model)).load(weights, "it")


def test_a_part_alone_does_not_stand_for_the_rest(tmp_path):
    folder, _ = saved_part(tmp_path)
    model = Wrapping("model")
    model.other = nn.Linear(2, 2)
    weights = checkpoints_of(model, folder)[0].load()
    with pytest.raises(ValueError, match=r"Missing keys: other\.weight, other\.bias"):
        Original(copy_module(model)).load(weights, "it")


def around(weights: dict[str, torch.Tensor], *names: str) -> dict[str, torch.Tensor]:
    """The state dict of a module that has these weights as parts of some names."""
    return {f"{name}.{key}": tensor for name in names for key, tensor in weights.items()}


@pytest.mark.parametrize("prefix", ["module", "model", "_orig_mod.module", "module._orig_mod"])
def test_weights_of_what_wraps_the_model(prefix, tmp_path):
    model, trained = make_model(), make_model(seed=1).state_dict()
    torch.save({"state_dict": around(trained, prefix)}, tmp_path / "wrapped.ckpt")
    for source in (around(trained, prefix), tmp_path / "wrapped.ckpt"):
        (wrapped,), (plain,) = checkpoints_of(model, source), checkpoints_of(model, trained)
        assert_equal(wrapped.load(), trained)
        assert wrapped.fingerprint() == plain.fingerprint()


def test_weights_of_what_wraps_a_part_of_the_model():
    torch.manual_seed(3)
    trained = Tied().state_dict()
    weights = checkpoints_of(Wrapping("model"), around(trained, "module"))[0].load()
    assert_equal(weights, around(trained, "model"))


def test_tied_weights_of_what_wraps_the_model():
    weights = checkpoints_of(Tied(), {"module.embedding.weight": torch.ones(5, 3)})[0].load()
    assert set(weights) == {"embedding.weight", "head.weight"}


def test_an_average_of_weights_has_a_counter_beside_them():
    model = make_model()
    averaged = torch.optim.swa_utils.AveragedModel(make_model(seed=1))
    with pytest.warns(UserWarning, match=r"weights of module in .* of this LitNet; the others .*: n_averaged"):
        weights = checkpoints_of(model, averaged.state_dict())[0].load()
    assert_equal(weights, averaged.module.state_dict())


def test_several_models_that_fit_are_refused():
    both = around(make_model().state_dict(), "model", "ema")
    with pytest.raises(ValueError, match=r"several models that fit LitNet: model, ema; .* in place of model\.first"):
        checkpoints_of(make_model(), both)[0].load()


def test_own_weights_count_before_those_of_a_part():
    own = nn.Linear(2, 1).state_dict()
    weights = checkpoints_of(nn.Linear(2, 1), own | around(nn.Linear(2, 1).state_dict(), "old"))[0].load()
    with pytest.raises(ValueError, match=r"Unexpected keys: old\.weight, old\.bias"):
        Original(nn.Linear(2, 1)).load(weights, "it")


def test_what_wraps_another_model_keeps_its_names():
    for trained in ({"module.weight": torch.ones(2, 3)}, {"module.bias": torch.ones(1)}, {"a.b": torch.ones(1)}):
        weights = checkpoints_of(nn.Linear(2, 1), trained)[0].load()
        assert set(weights) == set(trained)
        with pytest.raises(ValueError, match="does not fit Linear"):
            Original(nn.Linear(2, 1)).load(weights, "it")


@pytest.mark.slow
def test_what_transformers_saves_is_read(tmp_path):
    from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    bert = BertForSequenceClassification(BertConfig(**sizes, intermediate_size=16, num_labels=3))
    gpt = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=40, n_positions=16))
    for number, network in enumerate((bert, gpt)):
        model = L.LightningModule()
        model.network = network
        expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for folder, options in (("checkpoint-1", {}), ("checkpoint-2", {"max_shard_size": "1KB"})):
            network.save_pretrained(tmp_path / str(number) / folder, **options)
        assert (tmp_path / str(number) / "checkpoint-2" / "model.safetensors.index.json").exists()
        for checkpoint in checkpoints_of(model, tmp_path / str(number)):
            assert_equal(checkpoint.load(), expected)
