"""AdvantageLogLikelihood against log-probabilities in float64; kinds of advantages, and bad ones."""

import pytest
import torch
from torch import nn

from lightning_trak.outputs import AdvantageLogLikelihood
from tests.outputs.tasks import Texts

SIZE, LENGTH = 3, 5


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Texts().double()


@pytest.fixture
def batch():
    torch.manual_seed(1)
    mask = torch.ones(SIZE, LENGTH, dtype=torch.long)
    mask[1, 3:] = 0
    ids = torch.randint(0, 9, (SIZE, LENGTH))
    labels = ids.clone()
    labels[:, 1] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "advantages": torch.randn(SIZE).double()}


def by_hand(module, batch, reduction="sum"):
    logs = module(batch["input_ids"], batch["attention_mask"])["logits"].log_softmax(-1)
    advantages = batch["advantages"].reshape(SIZE, -1).expand(SIZE, LENGTH)
    found = []
    for row in range(SIZE):
        terms = [
            advantages[row, t] * logs[row, t - 1, batch["labels"][row, t]]
            for t in range(1, LENGTH)
            if batch["labels"][row, t] != -100 and batch["attention_mask"][row, t]
        ]
        found.append(sum(terms) / (len(terms) if reduction == "mean" else 1))
    return torch.stack(found)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("shape", [(SIZE,), (SIZE, 1), (SIZE, LENGTH)])
def test_tokens(module, batch, reduction, shape):
    batch["advantages"] = torch.randn(shape, dtype=torch.float64)
    output = AdvantageLogLikelihood(reduction=reduction)
    found, expected = output.output(module, batch), by_hand(module, batch, reduction)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(output.loss(found), -expected)
    for mine, plain in zip(
        torch.autograd.grad(found.sum(), list(module.parameters())),
        torch.autograd.grad(expected.sum(), list(module.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(mine, plain)
    slope, curvature = output.derivatives(found)
    assert slope.tolist() == curvature.tolist() == [1, 1, 1]


def test_one_action():
    logits, advantages = torch.randn(4, 3, dtype=torch.float64), torch.tensor([1.5, -2.0, 0.0, 1.0])
    actions = torch.tensor([0, 2, 1, 1])
    expected = advantages * logits.log_softmax(-1).gather(1, actions[:, None])[:, 0]
    output = AdvantageLogLikelihood(actions="one")
    batches = (
        (logits, actions, advantages),
        (logits, actions[:, None], advantages[:, None]),
        {"input": logits, "label": actions, "advantage": advantages},
    )
    for batch in batches:
        torch.testing.assert_close(output.output(nn.Identity(), batch), expected)
    keyed = AdvantageLogLikelihood(actions="one", advantages_key="gae", labels_key="action")
    batch = {"input": logits, "action": actions, "gae": advantages}
    torch.testing.assert_close(keyed.output(nn.Identity(), batch), expected)
    whole = output.output(nn.Identity(), (logits, actions, torch.ones(4, dtype=torch.int64)))
    torch.testing.assert_close(whole * advantages, expected)


def test_tuples_of_tokens(module, batch):
    ids, advantages = batch["input_ids"], batch["advantages"]
    expected = AdvantageLogLikelihood().output(module, {"input_ids": ids, "advantages": advantages})
    torch.testing.assert_close(AdvantageLogLikelihood().output(module, (ids, advantages)), expected)
    torch.testing.assert_close(AdvantageLogLikelihood().output(module, (ids, ids, advantages)), expected)


def test_advantages_are_constants(module, batch):
    batch["advantages"].requires_grad_()
    AdvantageLogLikelihood().output(module, batch).sum().backward()
    assert batch["advantages"].grad is None


def test_an_advantage_without_a_token_does_not_count(module, batch):
    batch["advantages"] = torch.randn(SIZE, LENGTH, dtype=torch.float64)
    expected = AdvantageLogLikelihood().output(module, batch)
    batch["advantages"][1, 3:] = batch["advantages"][:, 0] = torch.nan
    torch.testing.assert_close(AdvantageLogLikelihood().output(module, batch), expected)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("advantages", torch.nan, "its advantage is nan"),
        ("advantages", torch.inf, "its advantage is inf"),
        ("labels", -100, "none of its tokens counts"),
        ("attention_mask", 0, "none of its tokens counts"),
        ("labels", 9, "one of its actions is 9, and the model has 9"),
    ],
)
def test_bad_examples_have_no_output(module, batch, name, value, reason):
    batch[name][1] = value
    for reduction in ("sum", "mean"):
        output = AdvantageLogLikelihood(reduction=reduction)
        assert output.output(module, batch).isfinite().tolist() == [True, False, True]
    for number, expected in ((0, None), (1, reason)):
        found = output.explain_nan(module, {name: part[number : number + 1] for name, part in batch.items()})
        assert found is expected or found.startswith(expected)


@pytest.mark.parametrize(
    ("output", "change", "message"),
    [
        ({}, lambda batch: {"input_ids": batch["input_ids"]}, "advantages under 'advantages' or 'advantage'"),
        ({}, lambda batch: batch["input_ids"], "received a Tensor; name them with advantages_key="),
        ({}, lambda batch: batch | {"advantages": torch.ones(SIZE, 4)}, r"shape \(3,\) or \(3, 5\), received \(3, 4\)"),
        ({}, lambda batch: batch | {"advantages": torch.ones(2)}, r"received \(2,\)"),
        (
            {"forward": lambda module, batch: module(batch["input_ids"])},
            lambda batch: batch | {"attention_mask": torch.ones(SIZE, 4)},
            "attention_mask of the labels' shape",
        ),
        ({"actions": "one"}, lambda batch: batch | {"labels": torch.zeros(SIZE).long()}, r"logits of shape \(3, act"),
    ],
)
def test_batches_that_do_not_fit_are_refused(module, batch, output, change, message):
    with pytest.raises(ValueError, match=message):
        AdvantageLogLikelihood(**output).output(module, change(batch))


def test_continuous_actions_and_bad_arguments_are_refused():
    output = AdvantageLogLikelihood(actions="one")
    with pytest.raises(ValueError, match="float32 actions; for continuous actions use NegativeLoss"):
        output.output(nn.Identity(), (torch.randn(4, 3), torch.randn(4), torch.ones(4)))
    with pytest.raises(ValueError, match="expected 4 advantages, one for each action, received 2"):
        output.output(nn.Identity(), (torch.randn(4, 3), torch.zeros(4).long(), torch.ones(2)))
    with pytest.raises(ValueError, match="actions must be one of"):
        AdvantageLogLikelihood(actions="many")
    with pytest.raises(ValueError, match="reduction must be one of"):
        AdvantageLogLikelihood(reduction="none")
