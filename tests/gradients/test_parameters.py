"""Which parameters a selection chooses, and by which names."""

import pytest
import torch
from torch import nn

from lightning_trak.checkpoints.names import canonical_name
from lightning_trak.gradients import last_layer, select_parameters


class Tied(nn.Module):
    """A language model's habit: the head is the table of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(5, 3)
        self.inner = nn.Linear(3, 3)
        self.lm_head = nn.Linear(3, 5, bias=False)
        self.lm_head.weight = self.tokens.weight


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("weight", "weight"),
        ("0._orig_mod.weight", "0.weight"),
        ("_orig_mod._fsdp_wrapped_module.a._checkpoint_wrapped_module.weight", "a.weight"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("a.my_fsdp_wrapped_module.bias", "a.my_fsdp_wrapped_module.bias"),
        ("_orig_mod_of.bias", "_orig_mod_of.bias"),
        ("a._orig_mod", "a._orig_mod"),
    ],
)
def test_only_whole_parts_of_a_name_are_wrappers(name, expected):
    assert canonical_name(name) == expected


@pytest.mark.parametrize(
    "selection",
    ["lm_head.*", "tokens.weight", ["lm_head.weight", "tokens.*"], lambda name, parameter: name.startswith("lm_head")],
)
def test_a_tied_parameter_can_be_chosen_by_any_of_its_names(selection):
    assert select_parameters(Tied(), selection) == {"tokens.weight": "tokens.weight"}


def test_a_tied_parameter_counts_once():
    assert list(select_parameters(Tied())) == ["tokens.weight", "inner.weight", "inner.bias"]
    assert last_layer(Tied()) == ["tokens.weight"]
    with pytest.raises(ValueError, match=r"the model has: tokens\.weight, lm_head.weight, inner.weight, inner.bias"):
        select_parameters(Tied(), "head.*")


def test_parameters_without_elements_are_left_out():
    module = nn.Sequential(nn.Linear(2, 2))
    module.register_parameter("nothing", nn.Parameter(torch.empty(0, 3)))
    assert list(select_parameters(module)) == ["0.weight", "0.bias"]
    assert list(select_parameters(module, "*")) == ["0.weight", "0.bias"]
    with pytest.raises(ValueError, match="parameters= chose only parameters without elements: nothing"):
        select_parameters(module, "nothing")


def test_lazy_parameters_are_refused_until_they_have_a_shape():
    module = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 1))
    with pytest.raises(ValueError, match=r"'0.weight' has no shape yet.*call the Sequential on a batch once"):
        select_parameters(module)
    module(torch.zeros(1, 3))
    assert list(select_parameters(module, "0.*")) == ["0.weight", "0.bias"]


@pytest.mark.parametrize("selection", [3, [3], [["head"]]])
def test_selections_of_other_types_are_refused(selection):
    with pytest.raises(TypeError, match=r"expected parameters as patterns for names, such as .* got "):
        select_parameters(nn.Linear(3, 2), selection)
