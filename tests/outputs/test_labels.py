"""Where labels are in a batch, and what is said of labels that are none."""

from collections import namedtuple
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_trak.outputs import CausalLMMargin, ClassificationMargin, NegativeLoss, RegressionOutput, Seq2SeqLMMargin
from tests.graphs import Data

Reversed = namedtuple("Reversed", ["labels", "inputs"])


class Scaled(nn.Module):
    """A model of one or two inputs."""

    def forward(self, inputs, scale=1.0):
        return inputs * scale


@pytest.fixture
def parts():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(5, 3, generator=generator)
    return inputs, torch.rand(5, 1, generator=generator), torch.randint(0, 3, (5,), generator=generator)


def same(output, batch, expected):
    torch.testing.assert_close(output.output(Scaled(), batch), expected)


def test_labels_at_a_position(parts):
    x, scale, y = parts
    expected = ClassificationMargin().output(Scaled(), (x, scale, y))
    for key, batch in [(0, (y, x, scale)), (1, [x, y, scale]), (-2, (x, y, scale)), (2, (x, scale, y))]:
        same(ClassificationMargin(labels_key=key), batch, expected)
    same(ClassificationMargin(labels_key=np.int64(1)), (x, y, scale), expected)
    same(ClassificationMargin(labels_key=("labels", 1)), (x, y, scale), expected)
    same(ClassificationMargin(labels_key=("labels", 1)), {"inputs": x, "labels": y, "scale": scale}, expected)
    same(ClassificationMargin(), Reversed(y, x), ClassificationMargin().output(Scaled(), (x, y)))


def test_labels_that_a_function_finds(parts):
    x, scale, y = parts
    expected = ClassificationMargin().output(Scaled(), (x, scale, y))
    same(ClassificationMargin(labels_key=lambda batch: batch[0]), (y, x, scale), expected)
    batch = {"inputs": x, "scale": scale, "kind": y}
    same(ClassificationMargin(labels_key=lambda batch: batch["kind"]), batch, expected)
    nested = x, {"scale": scale, "kind": y}
    find = lambda batch: batch[1]["kind"]  # noqa: E731
    forward = lambda module, batch: module(batch[0], batch[1]["scale"])  # noqa: E731
    same(ClassificationMargin(forward, find), nested, expected)
    with pytest.raises(TypeError, match=r"it is not known what Scaled takes: pass forward= too"):
        ClassificationMargin(labels_key=find).output(Scaled(), nested)


def test_labels_are_found_under_vmap(parts):
    x, scale, y = parts
    expected = ClassificationMargin().output(Scaled(), (x, scale, y))
    for output in (ClassificationMargin(labels_key=1), ClassificationMargin(labels_key=lambda batch: batch[1])):
        single = torch.vmap(lambda *row, of=output: of.output(Scaled(), [part[None] for part in row])[0])
        torch.testing.assert_close(single(x, y, scale), expected)


def test_other_outputs_take_positions_too(parts):
    x, _, _ = parts
    y = torch.arange(5.0)
    same(RegressionOutput(labels_key=0), (y, x[:, :1]), x[:, 0] - y)
    ids = torch.tensor([[1, 2, 0]])
    embed = partial(nn.functional.one_hot, num_classes=4)
    logits = lambda module, batch: embed(batch[1]).float()  # noqa: E731
    for kind in (CausalLMMargin, Seq2SeqLMMargin):
        expected = kind(forward=lambda module, batch: embed(batch[0]).float()).output(Scaled(), (ids, ids))
        torch.testing.assert_close(kind(forward=logits, labels_key=0).output(Scaled(), (ids, ids)), expected)


def test_the_attention_mask_counts_wherever_labels_come_from():
    ids = torch.tensor([[1, 2, 0, 3]])
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 0]]), "more": {"labels": ids}}
    forward = lambda module, batch: nn.functional.one_hot(batch["input_ids"], 4).float()  # noqa: E731
    nested = CausalLMMargin(forward=forward, labels_key=lambda batch: batch["more"]["labels"])
    plain = CausalLMMargin(forward=forward)
    torch.testing.assert_close(nested.output(Scaled(), batch), plain.output(Scaled(), batch))


@pytest.mark.parametrize(
    ("key", "batch", "message"),
    [
        (5, (1, 2), "labels at position 5 of the batch, received a tuple of 2"),
        (-3, (1, 2), "labels at position -3 of the batch, received a tuple of 2"),
        (1, {"x": 1, "y\x1b": 2}, r"labels under 1 in the batch, received the keys x, y\\x1b; name the right one"),
    ],
)
def test_places_that_a_batch_does_not_have(key, batch, message):
    with pytest.raises(ValueError, match=message):
        ClassificationMargin(labels_key=key).output(Scaled(), batch)


@pytest.mark.parametrize("key", [True, 1.0, ("labels", 0.5)])
def test_other_keys_are_refused(key):
    with pytest.raises(TypeError, match="expected labels_key as a key or attribute, a position in a tuple, or a func"):
        ClassificationMargin(labels_key=key)


def test_a_function_must_find_a_tensor(parts):
    x, _, y = parts
    with pytest.raises(TypeError, match="expected the labels as a Tensor, received a int"):
        ClassificationMargin(labels_key=lambda batch: 3).output(Scaled(), (x, y))


@pytest.mark.parametrize(
    ("classes", "label", "message"),
    [
        (3, 7, "its label is 7, and the model has 3 classes, 0 to 2; leave such examples out"),
        (3, -100, "its label is -100, and the model has 3 classes"),
        (2, 2, "its label is 2, and the model has 2 classes, 0 and 1"),
        (1, -1, "its label is -1, and the model has 2 classes, 0 and 1"),
        (1, 0.75, "its label is 0.75, and the model has 2 classes"),
        (1, float("nan"), "its label is nan, and"),
        (3, 2, None),
        (1, 1.0, None),
    ],
)
def test_a_bad_label_is_named(classes, label, message):
    output, batch = ClassificationMargin(), (torch.zeros(1, classes), torch.tensor([label]))
    assert output.output(Scaled(), batch).isnan().item() == (message is not None)
    _compare(output.explain_nan(Scaled(), batch), message)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, 9, 2], "one of its labels is 9, and the vocabulary has 4 tokens, 0 to 3"),
        ([1, -1, 2], "one of its labels is -1, and the vocabulary has 4 tokens"),
        ([1, -100, 3], "none of its tokens counts, as all are masked, labelled -100 or pad_token_id=3, or first"),
        ([-100, 1, 3], None),
    ],
)
def test_a_text_without_a_margin_is_named(labels, message):
    output = CausalLMMargin(pad_token_id=3)
    batch = torch.zeros(1, 3, 4), torch.tensor([labels])
    assert output.output(Scaled(), batch).isnan().item() == (message is not None)
    _compare(output.explain_nan(Scaled(), batch), message)
    batch = torch.zeros(1, 2, 4), torch.tensor([labels[1:]])
    _compare(Seq2SeqLMMargin(pad_token_id=3).explain_nan(Scaled(), batch), message)


def test_a_text_of_one_token_is_named():
    output, batch = CausalLMMargin(), (torch.zeros(2, 1, 4), torch.tensor([[1], [2]]))
    assert output.output(Scaled(), batch).isnan().all()
    assert "first in the text" in output.explain_nan(Scaled(), (batch[0][:1], batch[1][:1]))


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(reduction="none"), F.cross_entropy])
def test_a_loss_of_outputs_and_labels_is_refused(loss):
    with pytest.raises(TypeError, match=r"calls loss_fn\(module, batch\), and \w+ of torch takes outputs and labels"):
        NegativeLoss(loss)


def test_a_bad_target_is_named():
    batch = torch.zeros(1, 1), torch.tensor([float("inf")])
    assert (
        RegressionOutput().explain_nan(Scaled(), batch) == "its target is inf; leave such examples out of the dataset"
    )
    assert RegressionOutput().explain_nan(Scaled(), (batch[0], torch.ones(1))) is None
    assert NegativeLoss(lambda module, batch: batch).explain_nan(Scaled(), batch) is None


def _compare(found, message):
    assert (found is None) == (message is None)
    if message is not None:
        assert found.startswith(message)


def test_the_truth_of_an_object_is_its_attribute():
    batch = Data(x=torch.randn(2, 4), y=torch.tensor([1, 0]))
    output = ClassificationMargin(forward=lambda module, batch: module(batch.x), labels_key="y")
    assert output.prediction(nn.Linear(4, 3), batch)[:, :2].tolist() == [[1, 1], [1, 0]]
