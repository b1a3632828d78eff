"""Gradients in a shorter exact form, and their inner products, against the gradients themselves."""

import pytest
import torch
from torch import nn

from lightning_trak.gradients import FunctionalEngine, HookEngine, LoopEngine, MixedEngine, select_parameters
from lightning_trak.gradients.base import EngineError
from lightning_trak.gradients.batch import ExampleBatch
from lightning_trak.gradients.hooks.factors import GradientForm, GradientForms, find_forms
from lightning_trak.outputs import ClassificationMargin
from lightning_trak.scoring.newton import inner_products as module_of_products
from lightning_trak.scoring.newton.inner_products import inner_products
from tests.lit import OwnLinear
from tests.zoo import Specimen, specimen


class Sequence(nn.Module):
    """Tokens at three positions: an embedding with few of its rows used, and linear layers over positions."""

    def __init__(self, tied=False, calls=1):
        super().__init__()
        self.tokens = nn.Embedding(50, 16, padding_idx=0)
        self.mix = nn.Linear(16, 24)
        self.back = nn.Linear(24, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.calls = calls
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids):
        hidden = self.tokens(ids)
        for _ in range(self.calls):
            hidden = hidden + self.back(torch.tanh(self.mix(hidden)))
        return self.head(hidden.mean(1))


def sequence(length=3, **options):
    ids = torch.randint(0, 50, (4, length), generator=torch.Generator().manual_seed(length))
    ids[1, 1], ids[2, 0] = ids[1, 0], 0  # the same token twice, and padding
    return Specimen(Sequence(**options), ClassificationMargin(), (ids, torch.tensor([0, 1, 2, 0])), 4)


def images(size=4):
    module = nn.Sequential(
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(16, 16, 3, groups=2), nn.Conv2d(16, 16, 2),
        nn.Flatten(), nn.LazyLinear(3),
    )  # fmt: skip
    module[2] = nn.Conv2d(16, 16, 3, padding=1, groups=2)
    batch = (torch.randn(4, 8, size, size, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0]))
    module(batch[0])
    return Specimen(module, ClassificationMargin(), batch, 4)


_OF_ZOO = ["mlp", "groupnorm", "attention", "gpt_tied", "convolutions", "normalizations", "reuse"]
CASES = {name: lambda name=name: specimen(name, torch.float64) for name in _OF_ZOO} | {
    "sequence": sequence,
    "tied": lambda: sequence(tied=True),
    "called twice": lambda: sequence(calls=2),
    "long": lambda: sequence(length=9),
    "images": images,
}


def engine_of(found, names):
    left_out = HookEngine.uncovered(found.module, names)
    if left_out:
        return MixedEngine(found.module, found.output, names, left_out)
    return HookEngine(found.module, found.output, names)


def stored_of(found, forms=None, parameters=None):
    """The forms, what is stored, and the gradients, all in float64."""
    module = found.module.double().eval()
    content = found.batch
    if isinstance(content, tuple):
        content = tuple(part.double() if part.is_floating_point() else part for part in content)
    batch, names = ExampleBatch(content, found.size), select_parameters(module, parameters)
    engine = engine_of(found, names)
    forms = forms or find_forms(engine, batch)
    stored = torch.zeros(found.size, forms.width, dtype=torch.float64)
    outputs = forms.collect(engine, batch, stored)
    expected, rows = LoopEngine(module, found.output, names)(batch)
    torch.testing.assert_close(outputs, expected)
    return forms, stored, torch.cat([rows[name] for name in names], dim=1)


def require_products(forms, stored, gradients):
    expected = gradients[:3] @ gradients.T
    found = inner_products(forms, stored[:3], stored)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_gradients_and_inner_products_are_those_of_autograd(name):
    forms, stored, gradients = stored_of(CASES[name]())
    torch.testing.assert_close(forms.gradients(stored), gradients)
    assert forms.width <= gradients.shape[1]
    require_products(forms, stored, gradients)


@pytest.mark.parametrize("name", ["sequence", "images"])
def test_inner_products_of_a_few_numbers_at_a_time(name, monkeypatch):
    monkeypatch.setattr(module_of_products, "_BYTES", 1)  # one example, row or column at a time
    require_products(*stored_of(CASES[name]()))


def kinds(forms):
    return {form.name: (form.kind, form.positions) for form, _ in forms}


def test_the_shortest_form_is_taken():
    found = kinds(stored_of(sequence())[0])
    assert found["tokens.weight"] == ("rows", 3)
    assert found["mix.weight"] == found["back.weight"] == ("factors", 3)
    assert found["head.weight"] == ("factors", 1)
    assert found["mix.bias"] == ("gradient", 1)
    found = kinds(stored_of(images())[0])
    assert found["0.weight"] == ("factors", 4)
    assert found["2.weight"] == ("gradient", 1)  # it has groups
    assert found["3.weight"] == ("factors", 1)
    assert kinds(stored_of(sequence(length=9))[0])["tokens.weight"][0] == "gradient"


def test_parameters_that_are_used_several_times_are_added_up():
    assert kinds(stored_of(sequence(tied=True))[0])["tokens.weight"] == ("gradient", 1)
    found = kinds(stored_of(sequence(calls=2))[0])
    assert found["mix.weight"] == found["back.weight"] == ("gradient", 1)


def test_vmap_gives_what_hooks_leave_out():
    found = sequence()
    found.module.mix.__class__ = OwnLinear
    forms, stored, gradients = stored_of(found)
    assert kinds(forms)["mix.weight"] == ("gradient", 1)
    assert kinds(forms)["back.weight"] == ("factors", 3)
    torch.testing.assert_close(forms.gradients(stored), gradients)


def test_selected_parameters_alone():
    forms, stored, gradients = stored_of(sequence(), parameters=["mix.weight", "tokens.weight"])
    assert list(kinds(forms)) == ["tokens.weight", "mix.weight"]
    torch.testing.assert_close(forms.gradients(stored), gradients)


def test_fewer_positions_are_filled_up():
    forms, _, _ = stored_of(sequence(length=3))
    _, stored, gradients = stored_of(sequence(length=2), forms)
    torch.testing.assert_close(forms.gradients(stored), gradients)
    torch.testing.assert_close(inner_products(forms, stored, stored), gradients @ gradients.T)


def test_more_positions_are_refused():
    forms, _, _ = stored_of(sequence(length=3))
    with pytest.raises(ValueError, match=r"is used at 4 positions of an example, but at 3 of the first.*pad all"):
        stored_of(sequence(length=4), forms)


def test_more_calls_than_before_are_refused():
    forms, _, _ = stored_of(sequence())
    with pytest.raises(EngineError, match=r"(mix|back)\.weight is used several times in a forward pass"):
        stored_of(sequence(calls=2), forms)


def test_an_engine_that_has_no_factors_is_refused():
    found = sequence()
    forms, _, _ = stored_of(found)
    names = select_parameters(found.module)
    engine = FunctionalEngine(found.module, found.output, names)
    with pytest.raises(ValueError, match="keeps gradients in the form that module hooks give"):
        forms.collect(engine, ExampleBatch(found.batch, 4), torch.zeros(4, forms.width, dtype=torch.float64))


def test_forms_of_several_batches_are_merged():
    short, long = (find_forms_of(sequence(length=length)) for length in (2, 3))
    assert kinds(short.merged(long)) == kinds(long.merged(short)) == kinds(long)
    twice = find_forms_of(sequence(calls=2))
    assert kinds(long.merged(twice))["mix.weight"] == ("gradient", 1)


def find_forms_of(found):
    return stored_of(found)[0]


def test_forms_are_read_as_they_were_written():
    forms = find_forms_of(sequence())
    assert kinds(GradientForms.from_tensors(forms.to_tensors())) == kinds(forms)
    bad = GradientForms([GradientForm("a", "gradient", 1, 1, 3)]).to_tensors()
    bad["forms"] = bad["forms"][:-3]
    with pytest.raises(ValueError, match=r"Expecting|Unterminated|delimiter"):
        GradientForms.from_tensors(bad)


def test_rows_of_another_width_are_refused():
    forms = GradientForms([GradientForm("weight", "gradient", 1, 3, 4)])
    with pytest.raises(ValueError, match="expected stored gradients of 12 numbers, received 11 a row"):
        inner_products(forms, torch.zeros(2, 12), torch.zeros(2, 11))
