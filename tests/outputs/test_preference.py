"""PreferenceMargin against log-probabilities in float64; kinds of references and batches, and bad texts."""

import copy

import pytest
import torch
import torch.nn.functional as F

from lightning_trak.outputs import PreferenceMargin
from tests.outputs.tasks import Texts

SIZE = 3


def make(seed=0):
    torch.manual_seed(seed)
    return Texts().double()


@pytest.fixture
def batch():
    torch.manual_seed(5)
    columns = {}
    for side, length in (("chosen", 6), ("rejected", 4)):
        mask = torch.ones(SIZE, length, dtype=torch.long)
        mask[1, 3:] = 0
        ids = torch.randint(0, 9, (SIZE, length))
        labels = torch.where(mask == 1, ids, -100)
        labels[:, 0] = labels[0, 1] = -100
        columns |= {f"{side}_input_ids": ids, f"{side}_attention_mask": mask, f"{side}_labels": labels}
    return columns


def log_likelihood(module, batch, side):
    """Token by token."""
    ids, mask, labels = (batch[f"{side}_{name}"] for name in ("input_ids", "attention_mask", "labels"))
    logs = module(ids, mask)["logits"].log_softmax(-1)
    total = torch.zeros(len(ids), dtype=logs.dtype)
    for row in range(len(ids)):
        for t in range(1, ids.shape[1]):
            if labels[row, t] != -100:
                total[row] = total[row] + logs[row, t - 1, labels[row, t]]
    return total


def test_margin_and_loss_are_those_of_dpo(batch):
    module, reference = make(0), make(1)
    ratios = [
        log_likelihood(module, batch, side) - log_likelihood(reference, batch, side) for side in ("chosen", "rejected")
    ]
    expected = 0.3 * (ratios[0] - ratios[1])
    output = PreferenceMargin(reference, beta=0.3)
    found = output.output(module, batch)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(output.loss(found), -F.logsigmoid(expected))
    parameters = list(module.parameters())
    for mine, plain in zip(
        torch.autograd.grad(found.sum(), parameters), torch.autograd.grad(expected.sum(), parameters), strict=True
    ):
        torch.testing.assert_close(mine, plain)
    slope, curvature = output.derivatives(found)
    torch.testing.assert_close(slope, torch.sigmoid(-found.detach()))
    torch.testing.assert_close(curvature, slope * (1 - slope))


def test_all_references_agree(batch):
    module, reference = make(0), make(1)
    expected = PreferenceMargin(reference).output(module, batch)
    by_function = PreferenceMargin(lambda module, text: reference(text["input_ids"], text["attention_mask"]))
    torch.testing.assert_close(by_function.output(module, batch), expected)
    stored = {f"ref_{side}_logps": log_likelihood(reference, batch, side).detach() for side in ("chosen", "rejected")}
    torch.testing.assert_close(PreferenceMargin(None).output(module, batch | stored), expected)


def test_the_reference_is_a_frozen_copy(batch):
    module, reference = make(0), make(1).train()
    output = PreferenceMargin(reference)
    before = output.output(module, batch)
    fingerprint = output.fingerprint()
    assert reference.training
    assert all(parameter.requires_grad for parameter in reference.parameters())
    with torch.no_grad():
        reference.head.bias.add_(1)
    assert torch.equal(output.output(module, batch), before)
    assert output.fingerprint() == fingerprint != PreferenceMargin(reference).fingerprint()
    before.sum().backward()
    assert all(parameter.grad is None for parameter in [*reference.parameters(), *output.reference.parameters()])


def test_a_model_that_is_its_reference_has_margin_zero_and_a_gradient(batch):
    module = make()
    margin = PreferenceMargin(module).output(module, batch)
    assert torch.equal(margin, torch.zeros(SIZE, dtype=torch.float64))
    assert torch.autograd.grad(margin.sum(), module.head.weight)[0].any()


def test_kinds_of_batches(batch):
    module, output = make(0), PreferenceMargin(make(1))
    expected = output.output(module, batch)
    halves = [
        {name.removeprefix(f"{side}_"): part for name, part in batch.items() if name.startswith(side)}
        for side in ("chosen", "rejected")
    ]
    torch.testing.assert_close(output.output(module, tuple(halves)), expected)
    ids = [half["input_ids"] for half in halves]
    bare = output.output(module, ids)
    torch.testing.assert_close(bare, output.output(module, [{"input_ids": part} for part in ids]))
    torch.testing.assert_close(bare, output.output(module, [(part, part) for part in ids]))


def test_a_prompt_that_counts_cancels():
    module, output = make(0), PreferenceMargin(make(1))
    prompt = torch.randint(0, 9, (2, 3))
    texts = [torch.cat([prompt, torch.randint(0, 9, (2, length))], 1) for length in (2, 4)]
    labels = [torch.cat([torch.full_like(prompt, -100), text[:, 3:]], 1) for text in texts]
    masked = output.output(module, list(zip(texts, labels, strict=True)))
    torch.testing.assert_close(output.output(module, texts), masked)


def test_padding_does_not_matter(batch):
    module, output = make(0), PreferenceMargin(make(1))
    padded = {name: F.pad(part, (0, 3), value=-100 if "labels" in name else 0) for name, part in batch.items()}
    torch.testing.assert_close(output.output(module, padded), output.output(module, batch))


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("rejected_labels", -100, "in its rejected text, none of its tokens counts"),
        ("chosen_attention_mask", 0, "in its chosen text, none of its tokens counts"),
        ("chosen_labels", 9, "in its chosen text, one of its labels is 9, and the vocabulary has 9"),
    ],
)
def test_bad_texts_have_no_margin(batch, column, value, reason):
    module, output = make(0), PreferenceMargin(make(1))
    batch[column][1] = value
    margin = output.output(module, batch)
    assert margin.isnan().tolist() == [False, True, False]
    for number, expected in ((0, None), (1, reason)):
        found = output.explain_nan(module, {name: part[number : number + 1] for name, part in batch.items()})
        assert found is expected or found.startswith(expected)


def without(batch, *names):
    return {name: part for name, part in batch.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda batch: without(batch, "rejected_input_ids"), "expected chosen_input_ids and rejected_input_ids"),
        (lambda batch: batch | {"prompt_input_ids": torch.zeros(3, 2)}, "also holds prompt_input_ids, .*label -100"),
        (lambda batch: batch | {"ref_chosen_logps": torch.zeros(3)}, "also holds ref_chosen_logps"),
        (lambda batch: batch | {"rejected_labels": torch.zeros(3, 4)}, "labels as token ids"),
        (lambda batch: (batch["chosen_input_ids"],), r"pair \(chosen, rejected\), received a tuple of 1"),
        (lambda batch: batch["chosen_input_ids"], r"expected a pair .*received a Tensor"),
        (lambda batch: (batch["chosen_input_ids"], batch["rejected_input_ids"][:2]), "3 chosen and 2 rejected"),
    ],
)
def test_batches_that_do_not_fit_are_refused(batch, change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        PreferenceMargin(make(1)).output(make(0), change(batch))


def test_a_mask_that_does_not_fit_is_refused(batch):
    batch["chosen_attention_mask"] = torch.ones(3, 5)
    blind = PreferenceMargin(make(1), forward=lambda module, text: module(text["input_ids"]))
    with pytest.raises(ValueError, match="attention_mask of the labels' shape"):
        blind.output(make(0), batch)


def test_stored_log_likelihoods_that_do_not_fit_are_refused(batch):
    output = PreferenceMargin(None)
    with pytest.raises(ValueError, match="under 'ref_chosen_logps'"):
        output.output(make(), batch)
    stored = {"ref_chosen_logps": torch.zeros(1), "ref_rejected_logps": torch.zeros(3)}
    with pytest.raises(ValueError, match="of each of 3 chosen texts, received 1"):
        output.output(make(), batch | stored)
    bad = {"ref_chosen_logps": torch.zeros(3), "ref_rejected_logps": torch.tensor([0, torch.nan, 0])}
    assert output.output(make(), batch | bad).isnan().tolist() == [False, True, False]
    one = {name: part[1:2] for name, part in (batch | bad).items()}
    assert output.explain_nan(make(), one) == "the reference gives its rejected text the log-likelihood nan"


@pytest.mark.parametrize("beta", [0, -1, torch.nan, torch.inf, "0.1"])
def test_bad_betas_are_refused(beta):
    with pytest.raises(ValueError, match="expected a positive beta"):
        PreferenceMargin(make(), beta=beta)


def test_bad_references_are_refused():
    with pytest.raises(TypeError, match=r"expected reference as a module, .*received a str"):
        PreferenceMargin("gpt2")


def test_the_output_can_be_copied(batch):
    module, output = make(0), PreferenceMargin(make(1))
    torch.testing.assert_close(copy.deepcopy(output).output(module, batch), output.output(module, batch))
