"""Every output under torch.func: gradients by vmap over examples equal those of autograd, one example at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_map

from lightning_trak.outputs import (
    CausalLMMargin,
    ClassificationMargin,
    ContrastiveMargin,
    NegativeLoss,
    RegressionOutput,
    Seq2SeqLMMargin,
)


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(5, 4)
        self.log_scale = nn.Parameter(torch.ones(()))

    def forward(self, first, second):
        return self.first(first), self.second(second)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)

    def forward(self, input_ids, attention_mask=None, decoder_input_ids=None):
        hidden = self.embedding(input_ids).cumsum(1)
        if decoder_input_ids is not None:
            hidden = hidden.mean(1, keepdim=True) + self.embedding(decoder_input_ids)
        return {"logits": self.head(hidden)}


def contrastive():
    output = ContrastiveMargin(lambda module: (-module.log_scale).exp())
    bank = torch.randn(7, 4), torch.randn(7, 4)
    output.set_context(dict(zip(("first", "second"), bank, strict=True)))
    return output


def cases():
    torch.manual_seed(0)
    x, classes, ids = torch.randn(4, 6), torch.tensor([0, 2, 1, 1]), torch.randint(0, 9, (4, 5))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    labels = torch.where(mask == 1, ids, -100)
    squared = NegativeLoss(lambda module, batch: F.mse_loss(module(batch[0]), batch[1]))
    module = Towers()
    itself = contrastive()
    pairs = (x, torch.randn(4, 5))
    itself.set_context(itself.make_context(module, [pairs]))
    return {
        "classification": (nn.Linear(6, 3), ClassificationMargin(), (x, classes)),
        "two classes": (nn.Linear(6, 2), ClassificationMargin(), (x, classes % 2)),
        "binary": (nn.Linear(6, 1), ClassificationMargin(), (x, classes % 2)),
        "keywords": (nn.Linear(6, 3), ClassificationMargin(), {"input": x, "label": classes}),
        "regression": (nn.Linear(6, 1), RegressionOutput(), (x, torch.randn(4))),
        "negative loss": (nn.Linear(6, 2), squared, (x, torch.randn(4, 2))),
        "causal": (Tokens(), CausalLMMargin(), ids),
        "causal, padded": (Tokens(), CausalLMMargin(), {"input_ids": ids, "attention_mask": mask}),
        "causal, labelled": (Tokens(), CausalLMMargin(pad_token_id=0), (ids, labels)),
        "seq2seq": (Tokens(), Seq2SeqLMMargin(), {"input_ids": ids, "decoder_input_ids": ids, "labels": labels}),
        "contrastive": (Towers(), contrastive(), (x, torch.randn(4, 5))),
        "contrastive, in the bank": (module, itself, pairs),
    }


CASES = cases()


class Call(nn.Module):
    """Brings the output under functional_call."""

    def __init__(self, module, output):
        super().__init__()
        self.module, self.output = module, output

    def forward(self, batch):
        return self.output.output(self.module, batch)


def vmap_gradients(module, output, batch):
    call = Call(module, output)

    def scalar(parameters, example):
        return functional_call(call, parameters, (tree_map(lambda part: part.unsqueeze(0), example),)).squeeze(0)

    parameters = {name: parameter.detach() for name, parameter in call.named_parameters()}
    return list(vmap(grad(scalar), (None, 0))(parameters, batch).values())


@pytest.mark.parametrize("case", CASES)
def test_vmap_equals_one_example_at_a_time(case):
    module, output, batch = CASES[case]
    found = vmap_gradients(module, output, batch)
    parameters = list(module.parameters())
    whole = None if case == "negative loss" else output.output(module, batch)  # its mean loss takes one example only
    for i in range(4):
        one = output.output(module, tree_map(lambda part, i=i: part[i : i + 1], batch))
        if whole is not None:
            torch.testing.assert_close(whole[i : i + 1], one)
        gradients = torch.autograd.grad(one.sum(), parameters, allow_unused=True, materialize_grads=True)
        assert any(gradient.abs().max() > 1e-4 for gradient in gradients)
        for by_vmap, expected in zip(found, gradients, strict=True):
            torch.testing.assert_close(by_vmap[i], expected, rtol=1e-4, atol=1e-5)
