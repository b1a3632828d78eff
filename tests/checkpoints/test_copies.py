"""Checkpoints are loaded into what the user's module holds, whatever was loaded before."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import TensorDataset

from lightning_trak import TRAK, GradientDot
from lightning_trak.checkpoints.copies import Original, copy_module
from lightning_trak.checkpoints.digests import state_digest
from lightning_trak.methods import RepresentationSimilarity
from lightning_trak.projections import IdentityProjection
from tests.lit import TARGETS, TRAIN, LitNet, make_checkpoints, make_model, make_trainer

WEIGHTS = make_checkpoints(2)


def part(weights: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if name.startswith(prefixes)}


class Partial(LitNet):
    strict_loading = False


class SavesAdapters(Partial):
    """Saves the head alone, under a name of its own, as adapters do."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return {f"adapter.{name}": tensor for name, tensor in part(super().state_dict(*args, **kwargs), "head").items()}

    def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        own = {name.removeprefix("adapter."): tensor for name, tensor in state_dict.items()}
        return super().load_state_dict(own, strict=False)


def trained(kind: type[LitNet]) -> LitNet:
    model = kind()
    nn.Module.load_state_dict(model, make_model().state_dict(), strict=False)
    return model


def scores(model: LitNet, checkpoints: list[dict[str, Tensor]], store: Path) -> Tensor:
    # Random projections follow from the contents of checkpoints, and a part of the weights is another content.
    trak = TRAK(model, checkpoints, store, projection=IdentityProjection())
    trak.featurize(make_trainer(), TRAIN)
    return trak.score(make_trainer(), TARGETS)


def state(module: nn.Module) -> dict[str, Tensor]:
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach().clone() for name, tensor in tensors}


def assert_state(module: nn.Module, expected: dict[str, Tensor]) -> None:
    found = state(module)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


# --- partial state dicts ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "checkpoints",
    [
        [part(WEIGHTS[0], "head"), part(WEIGHTS[1], "first")],
        [part(WEIGHTS[0], "head.weight"), part(WEIGHTS[1], "head.bias"), part(WEIGHTS[0], "norm")],
        [WEIGHTS[0], part(WEIGHTS[1], "head")],  # the first gives everything
        [part(WEIGHTS[1], "norm.running"), part(WEIGHTS[0], "head")],  # buffers
    ],
)
def test_no_checkpoint_leaks_into_the_next(checkpoints: list[dict[str, Tensor]], tmp_path: Path) -> None:
    model = trained(Partial)
    whole = [model.state_dict() | weights for weights in checkpoints]
    expected = scores(make_model(), whole, tmp_path / "whole")
    assert torch.equal(scores(model, checkpoints, tmp_path / "parts"), expected)
    assert not torch.allclose(scores(model, checkpoints[::-1][:1], tmp_path / "one"), expected)

    similarity = [RepresentationSimilarity(model, found) for found in (checkpoints, whole)]
    found, expected = (method.attribute(make_trainer(), TRAIN, TARGETS) for method in similarity)
    assert torch.equal(found, expected)


def test_each_load_starts_from_the_module_as_it_was() -> None:
    module = copy_module(trained(Partial))
    before = state(module)
    original = Original(module)
    for weights in (part(WEIGHTS[0], "head"), WEIGHTS[1], part(WEIGHTS[1], "first.bias"), WEIGHTS[0], {}):
        if weights:
            original.load(weights, "it")
        else:
            original.restore()
        assert_state(module, before | weights)


def test_names_that_only_the_module_knows() -> None:
    module = copy_module(trained(SavesAdapters))
    before = state(module)
    original = Original(module)
    for number, name in enumerate(("weight", "bias")):
        value = WEIGHTS[number][f"head.{name}"]
        original.load({f"adapter.head.{name}": value}, "it")
        assert_state(module, before | {f"head.{name}": value})


class Renames(LitNet):
    """Reads old names too, as strictly as any."""

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return super().load_state_dict({k.replace("old.", ""): v for k, v in state_dict.items()}, strict, assign)


def test_a_module_with_a_strict_way_of_its_own_to_load() -> None:
    original = Original(copy_module(Renames()))
    original.load({f"old.{name}": tensor for name, tensor in WEIGHTS[0].items()}, "it")
    assert_state(original._module, WEIGHTS[0] | {"scale": torch.tensor(1.5)})
    with pytest.raises(ValueError, match=r'(?s)does not fit Renames: .*Missing key.*"norm\.weight"'):
        original.load(part(WEIGHTS[1], "head", "first"), "it")


def test_tied_weights_that_are_given_under_one_name() -> None:
    class Tied(nn.Module):
        strict_loading = False

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(2, 2, bias=False) for _ in range(3))
            self.second.weight = self.first.weight

    module = Tied()
    before = state(module)
    original = Original(module)
    one = torch.ones(2, 2)
    for name in ("second.weight", "first.weight", "third.weight", "second.weight", "third.weight"):
        original.load({name: one}, "it")
        tied = ["third.weight"] if name == "third.weight" else ["first.weight", "second.weight"]
        assert_state(module, before | dict.fromkeys(tied, one))


def test_buffers_that_are_not_persistent_are_as_the_user_has_them() -> None:
    module = copy_module(make_model())
    original = Original(module)
    module.scale.mul_(3)
    original.load(WEIGHTS[0], "it")
    assert module.scale == 1.5
    with torch.inference_mode():
        module.scale = module.scale + 1  # as a forward pass in trainer.predict may do
    original.load(WEIGHTS[1], "it")
    assert module.scale == 1.5
    assert not module.scale.is_inference()
    module.double()  # as a precision plugin does
    module.scale.mul_(2)
    original.load(WEIGHTS[1], "it")
    assert module.scale == 1.5
    assert module.scale.dtype == torch.float64
    grown = module.scale = torch.ones(7)  # a cache that has grown: its module knows its size
    original.load(WEIGHTS[1], "it")
    assert module.scale is grown


def test_no_second_copy_is_held_of_models_that_are_loaded_strictly() -> None:
    original = Original(copy_module(make_model()))
    original.load(WEIGHTS[0], "it")
    assert original._kept.keys() == {"scale"}
    original = Original(copy_module(trained(Partial)))
    original.load(part(WEIGHTS[0], "head"), "it")
    weights = {name for name in original._kept if name in dict(make_model().named_parameters())}
    assert weights == {"head.weight", "head.bias"}


# --- what does not fit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head.bias": None}, r"Missing keys: head\.bias"),
        ({"first.weight": None, "norm.running_mean": None}, r"Missing keys: first\.weight, norm\.running_mean"),
        ({"tail.bias": torch.ones(3)}, r"Unexpected keys: tail\.bias"),
        ({"head.bias": torch.ones(4)}, r"size mismatch for head\.bias.*\[4\].*\[3\]"),
        ({"head.weight": torch.ones(3, 9), "first.bias": torch.ones(1)}, r"first\.bias.*head\.weight"),
        (
            {"head.bias": torch.ones(3, dtype=torch.complex64)},
            r"head\.bias is complex in the checkpoint, but real in the model",
        ),
        ({"head.bias": torch.ones(3, dtype=torch.int8)}, r"head\.bias has integers \(torch.int8\) in the checkpoint"),
        ({"norm.num_batches_tracked": torch.ones(5)}, r"norm\.num_batches_tracked: it has 5 numbers"),
        ({"_orig_mod.head.bias": torch.ones(3)}, "some of its names differ only in what wrappers add"),
    ],
)
@pytest.mark.parametrize("kind", [LitNet, Partial])
def test_what_does_not_fit_is_named(kind: type[LitNet], change: dict[str, Tensor | None], message: str) -> None:
    module = copy_module(kind())
    before = state(module)
    original = Original(module)
    original.load(WEIGHTS[1], "it")
    changed = {name: tensor for name, tensor in (WEIGHTS[0] | change).items() if tensor is not None}
    if kind is Partial and "keys" in message:  # it may
        original.load(changed, "snapshot 3")
        missing = {name: before[name] for name, tensor in change.items() if tensor is None}
        assert_state(module, before | WEIGHTS[0] | missing)
        return
    with pytest.raises(ValueError, match=rf"(?s)snapshot 3 does not fit {kind.__name__}: .*\n.*{message}"):
        original.load(changed, "snapshot 3")
    original.load(WEIGHTS[1], "it")
    assert_state(module, before | WEIGHTS[1])


def test_entries_without_a_place_are_told() -> None:
    original = Original(copy_module(Partial()))
    with pytest.warns(UserWarning, match=r"told has entries that Partial does not use: tail\.bias"):
        original.load(WEIGHTS[0] | {"tail.bias": torch.ones(3)}, "told")
    with pytest.raises(ValueError, match=r"(?s)does not fit Partial: .*Unexpected keys: model\.first\.weight, .* more"):
        original.load({f"model.{name}": tensor for name, tensor in WEIGHTS[0].items()}, "other")


def test_sharded_models_need_what_they_have_no_content_of() -> None:
    with torch.device("meta"):
        module = Partial()
    original = Original(module)
    module.to_empty(device="cpu")
    original.load(WEIGHTS[0] | {"scale": torch.tensor(1.5)}, "it")
    with pytest.raises(ValueError, match=r"on the meta device, without content: first\.weight, first\.bias, norm"):
        original.load(part(WEIGHTS[0], "head"), "it")


# --- the digest of what is loaded ---------------------------------------------------------------------------------


def test_the_digest_tells_everything_apart() -> None:
    def change(edit: Any) -> str:
        module = copy.deepcopy(MODEL)
        edit(module)
        return state_digest(module)

    def flip(tensor: Tensor) -> None:
        tensor.view(-1).view(torch.uint8)[0] ^= 1

    edits = [
        lambda module: None,
        lambda module: flip(module.first.weight.data),
        lambda module: flip(module.norm.running_var),
        lambda module: flip(module.scale),  # which no state dict has
        lambda module: module.head.double(),
        lambda module: module.register_buffer("more", torch.zeros(0)),
        lambda module: module.register_parameter("alias", module.head.bias),
        lambda module: module.head.weight.data.copy_(module.head.weight.data.roll(1, 0)),
    ]
    MODEL = make_model()
    digests = [change(edit) for edit in edits]
    assert digests[0] == state_digest(MODEL)
    assert len(set(digests)) == len(edits)
    MODEL.train()
    assert digests[0] == state_digest(MODEL)
    MODEL.first = torch.compile(MODEL.first, backend="eager")  # which puts _orig_mod into names
    assert digests[0] == state_digest(MODEL)


def test_the_digest_is_that_of_the_weights_and_not_of_how_they_came() -> None:
    module = copy_module(trained(Partial))
    original = Original(module)
    original.load(part(WEIGHTS[0], "head"), "it")
    parts = state_digest(module)
    whole = copy_module(make_model())
    Original(whole).load(make_model().state_dict() | part(WEIGHTS[0], "head"), "it")
    assert parts == state_digest(whole)


def test_the_digest_of_odd_tensors() -> None:
    matrix = torch.eye(4) * 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kinds = [
            *(matrix.to_sparse(layout=layout) for layout in (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc)),
            *(matrix.to_sparse(layout=layout, blocksize=(2, 2)) for layout in (torch.sparse_bsr, torch.sparse_bsc)),
            torch.quantize_per_tensor(matrix, 0.1, 0, torch.qint8),
            torch.quantize_per_tensor(matrix, 0.2, 0, torch.qint8),
            torch.quantize_per_channel(matrix, torch.ones(4), torch.zeros(4), 0, torch.qint8),
            matrix.to(torch.complex64),
            (matrix * 1j).conj(),
            (matrix * 1j),
            matrix.to(torch.float8_e4m3fn),
            matrix.to(torch.bfloat16),
            matrix[:0],
            torch.tensor(3.0),
            (matrix + torch.eye(4).roll(1, 0)).to_sparse(),
        ]
        digests = []
        for kind in kinds:
            module = nn.Module()
            module.register_buffer("buffer", kind, persistent=False)
            digests.append(state_digest(module))
            original = Original(copy_module(module))
            original.restore()
            assert state_digest(original._module) == digests[-1]
    assert len(set(digests)) == len(kinds)
    module.register_buffer("buffer", torch.empty(2, device="meta"))
    with pytest.raises(ValueError, match="buffer is on the meta device, without content"):
        state_digest(module)


@pytest.mark.parametrize("change", [torch.jit.script, lambda part: torch.jit.freeze(torch.jit.script(part.eval()))])
def test_scripted_parts_with_weights_are_refused(change: Any) -> None:
    body = nn.Sequential(nn.Linear(6, 4), nn.Tanh())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        parts = nn.Sequential(change(body), nn.Linear(4, 3)), change(nn.Sequential(nn.Linear(6, 3)))
    for module, place in zip(parts, ("0", "the model itself"), strict=True):
        with pytest.raises(ValueError, match=f"compiled by torch.jit.*: {place}.*pass a model of plain modules"):
            copy_module(module)


def test_scripted_parts_without_weights_are_copied(tmp_path: Path) -> None:
    class Scripted(LitNet):
        def __init__(self) -> None:
            super().__init__()
            self.tanh = torch.jit.script(nn.Tanh())

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head(self.tanh(self.norm(self.first(inputs)))) * self.scale

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found = scores(trained(Scripted), WEIGHTS, tmp_path / "scripted")
    assert torch.allclose(found, scores(make_model(), WEIGHTS, tmp_path / "plain"), rtol=1e-4, atol=1e-6)


class KeepsActivations(LitNet):
    """Keeps what it computes, as for a picture of it."""

    def forward(self, inputs: Tensor) -> Tensor:
        self.hidden = self.first(inputs)
        self.kept = [{"squares": self.hidden.square()}]
        return super().forward(inputs)


def with_norm() -> LitNet:
    model = make_model()
    nn.utils.weight_norm(model.first)
    return model


def pruned() -> LitNet:
    model = make_model()
    prune.random_unstructured(model.head, "weight", amount=0.3)
    return model


@pytest.mark.parametrize("make", [lambda: trained(KeepsActivations), with_norm, pruned])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_what_a_forward_pass_left_on_the_module_is_no_matter(make: Any, tmp_path: Path) -> None:
    model = make().double().eval()
    inputs, labels = (part.double() if part.is_floating_point() else part for part in TRAIN.tensors)
    output, parameters = model.configure_model_output(), list(model.parameters())
    rows = []
    for one in zip(inputs[:6, None], labels[:6, None], strict=True):
        gradients = torch.autograd.grad(output.output(model, one), parameters)
        rows.append(torch.cat([gradient.flatten() for gradient in gradients]))
    kept = [value for part in model.modules() for value in vars(part).values() if isinstance(value, Tensor)]
    assert kept
    assert not any(tensor.is_leaf for tensor in kept)
    data = TensorDataset(inputs[:6], labels[:6])
    options: Any = {"projection": IdentityProjection(), "dtype": "float64", "effect_on": "output"}
    found = GradientDot(model, store=tmp_path, **options).attribute(make_trainer(precision="64-true"), data, data)
    values = output.output(model, [inputs[:6], labels[:6]]).detach()
    expected = torch.stack(rows) @ (torch.stack(rows) * output.derivatives(values)[0][:, None]).T
    torch.testing.assert_close(found, expected)


def test_what_was_left_on_the_module_and_is_used_again_is_refused(tmp_path: Path) -> None:
    class Generated(LitNet):
        def generate(self) -> None:
            self.weight = self.head.weight.square()

        def forward(self, inputs: Tensor) -> Tensor:
            return self.first(inputs) @ self.weight.T

    model = Generated()
    model.generate()
    with pytest.raises(ValueError, match=r"depends on 1 tensors that require gradients and are not parameters"):
        TRAK(model, store=tmp_path).featurize(make_trainer(), TRAIN)
