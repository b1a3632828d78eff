"""The hook engine against the loop engine in float64, over the zoo and Hugging Face models."""

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.checkpoint import checkpoint

from lightning_trak.gradients import HookEngine, LoopEngine, MixedEngine, select_parameters
from lightning_trak.gradients.batch import ExampleBatch
from lightning_trak.gradients.hooks import projector
from lightning_trak.outputs import CausalLMMargin, ClassificationMargin, NegativeLoss
from lightning_trak.projections import (
    GaussianProjection,
    IdentityProjection,
    KroneckerProjection,
    SparseProjection,
    fold,
)
from tests.zoo import ZOO, specimen

KRONECKER = [KroneckerProjection(3, 2), KroneckerProjection(4, 5, dim=32), KroneckerProjection(1000, 1000)]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, gradient in expected.items():
        assert found[name].shape == gradient.shape
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: name + text
        )


def assert_agrees_with_loop(module, output, batch, size, names=None):
    names = names or select_parameters(module)
    engine = HookEngine(module, output, names)
    values, rows = engine(ExampleBatch(batch, size))
    loop_values, loop = LoopEngine(module, output, names)(ExampleBatch(batch, size))
    torch.testing.assert_close(values, loop_values, rtol=1e-12, atol=1e-12)
    assert_same(rows, loop)
    assert all(gradient.any() for gradient in loop.values())
    assert engine.check(ExampleBatch(batch, size)) == {}


@pytest.mark.parametrize("name", ZOO)
def test_agrees_with_the_loop_in_float64(name):
    module, output, batch, size = specimen(name, torch.float64)
    names = select_parameters(module)
    left_out = HookEngine.uncovered(module, names)
    assert_agrees_with_loop(
        module, output, batch, size, {key: raw for key, raw in names.items() if key not in left_out}
    )


def test_what_is_covered():
    left_out = {name: HookEngine.uncovered(found := specimen(name).module, select_parameters(found)) for name in ZOO}
    attention = ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]
    assert {name: list(names) for name, names in left_out.items() if names} == {
        "attention": [f"attention.{name}" for name in attention],
        "lstm": ["lstm.weight_ih_l0", "lstm.weight_hh_l0", "lstm.bias_ih_l0", "lstm.bias_hh_l0"],
        "gpt_tied": ["positions"],
        "text_classifier": [f"encoder.self_attn.{name}" for name in attention],
        "two_tower": ["text.0.weight"],
        "scaled": ["scale"],
    }


@pytest.mark.parametrize("name", ["attention", "lstm", "gpt_tied", "text_classifier", "two_tower", "scaled"])
def test_vmap_takes_what_hooks_leave_out(name):
    dtype = torch.float32 if name == "lstm" else torch.float64  # vmap knows no LSTM in float64
    module, output, batch, size = specimen(name, dtype)
    names = select_parameters(module)
    engine = MixedEngine(module, output, names, HookEngine.uncovered(module, names))
    values, rows = engine(ExampleBatch(batch, size))
    loop_values, loop = LoopEngine(module, output, names)(ExampleBatch(batch, size))
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if name == "lstm" else {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(values, loop_values, **tolerance)
    assert list(rows) == list(loop)
    torch.testing.assert_close(rows, loop, **tolerance)
    bound = IdentityProjection().bind({key: row.shape[1:] for key, row in rows.items()}, 0, 0, torch.device("cpu"))
    features = torch.zeros(size, bound.dim, dtype=dtype)
    torch.testing.assert_close(engine.project(ExampleBatch(batch, size), bound, features), values)
    torch.testing.assert_close(features, torch.cat(list(loop.values()), 1), **tolerance)


def hugging_face(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    ids = torch.randint(0, 30, (3, 7))
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 4 + [0] * 3])
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=30, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
        batch = {"input_ids": ids, "labels": ids, "attention_mask": mask}
        return transformers.GPT2LMHeadModel(config).double().eval(), CausalLMMargin(), batch
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, num_labels=3,
        max_position_embeddings=8,
    )  # fmt: skip
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 2])}
    return transformers.BertForSequenceClassification(config).double().eval(), ClassificationMargin(), batch


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_unmodified_hugging_face_models(kind):
    module, output, batch = hugging_face(kind)
    names = select_parameters(module)
    assert not HookEngine.uncovered(module, names)
    _, loop = LoopEngine(module, output, names)(ExampleBatch(batch, 3))
    engine = HookEngine(module, output, names)
    assert_same(engine(ExampleBatch(batch, 3))[1], loop)
    assert engine.check(ExampleBatch(batch, 3)) == {}
    alone = {key: value[:1] for key, value in batch.items()}
    assert_same(
        HookEngine(module, output, names)(ExampleBatch(alone, 1))[1], {key: row[:1] for key, row in loop.items()}
    )
    assert_same(engine(ExampleBatch(alone, 1))[1], {key: row[:1] for key, row in loop.items()})


def test_a_batch_as_long_as_the_texts_is_no_excuse():
    """With as many examples as positions, the positions' embedding looks as if it had a row for each example."""
    module, output, batch, _ = specimen("reuse", torch.float64)
    ids = batch[0].repeat(2, 1)
    assert ids.shape == (8, 8)
    assert_agrees_with_loop(module, output, (ids, batch[1].repeat(2)), 8)


@pytest.mark.parametrize("projection", [SparseProjection(64), GaussianProjection(32), IdentityProjection(), *KRONECKER])
@pytest.mark.parametrize("name", ["gpt", *ZOO])
def test_streaming_equals_projecting_the_rows(name, projection, monkeypatch):
    assert_streams(name, projection, monkeypatch)


@pytest.mark.parametrize("name", ["gpt", *ZOO])
def test_streaming_equals_projecting_the_rows_of_folded_matrices(name, monkeypatch):
    """As if all matrices were large."""
    monkeypatch.setattr(SparseProjection, "_slices", lambda _, rows, columns: min(rows, columns, 3))
    monkeypatch.setattr(fold, "_COLUMNS", 1)
    assert_streams(name, SparseProjection(64), monkeypatch)


def assert_streams(name, projection, monkeypatch):
    if name == "gpt":
        (module, output, batch), size = hugging_face("gpt2"), 3
    else:
        module, output, batch, size = specimen(name, torch.float64)
    names = select_parameters(module)
    left_out = HookEngine.uncovered(module, names)
    engine = HookEngine(module, output, {key: raw for key, raw in names.items() if key not in left_out})
    values, rows = engine(ExampleBatch(batch, size))
    shapes = {key: parameter.shape for key, parameter in engine.parameters.items()}
    bound = projection.bind(shapes, 1, 0, torch.device("cpu"))
    expected = torch.ones(size, bound.dim, dtype=torch.float64)
    for key, row in rows.items():
        bound.add_(expected, key, row)
    # All examples at once, a few of them, and a few of their rows; small gradients added by themselves, or several at
    # once; zero rows added, or left out.
    large, never = 1 << 23, 1 << 30
    for limit, rows, drawing, small in (
        (large, 32, never, 64),
        (400, 32, never, 64),
        (400, 3, never, 64),
        (2000, 32, never, 1),
        (large, 32, 0, 64),
        (large, 32, never, large),
    ):
        monkeypatch.setattr(projector, "_CPU_BYTES", limit)
        monkeypatch.setattr(projector, "_SMALL", small)
        monkeypatch.setattr(projector, "_CPU_ROWS", rows)
        monkeypatch.setattr(projector, "_DRAWING", drawing)
        features = torch.ones(size, bound.dim, dtype=torch.float64)
        torch.testing.assert_close(engine.project(ExampleBatch(batch, size), bound, features), values, rtol=0, atol=0)
        torch.testing.assert_close(features, expected, rtol=1e-12, atol=1e-12)


class _Live(TorchDispatchMode):
    """The elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [part.numel() for part in tree_flatten(result)[0] if isinstance(part, Tensor)]
        self.largest = max([self.largest, *sizes])
        return result


@pytest.mark.parametrize(
    "projection", [SparseProjection(64), KroneckerProjection(2, 3, 16)], ids=["sparse", "kronecker"]
)
def test_features_are_the_same_with_any_number_of_threads(projection):
    module = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 5, stride=2))
    module = nn.Sequential(*module, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(64, 4)).eval()
    batch = ExampleBatch((torch.randn(9, 3, 20, 20), torch.randint(0, 4, (9,))), 9)
    engine = HookEngine(module, ClassificationMargin(), select_parameters(module))
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    bound = projection.bind(shapes, 0, 0, torch.device("cpu"))
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 4):
            torch.set_num_threads(number)
            found.append(torch.zeros(9, bound.dim))
            engine.project(batch, bound, found[-1])
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[2], found[0], rtol=1e-4, atol=1e-5)


def test_the_check_never_holds_the_gradients_of_two_examples(monkeypatch):
    module = nn.Sequential(nn.Linear(16, 512), nn.Tanh(), nn.Linear(512, 3))
    monkeypatch.setattr(projector, "_CPU_BYTES", 1)
    engine = HookEngine(module, ClassificationMargin(), select_parameters(module))
    with _Live() as live:
        assert engine.check(ExampleBatch((torch.randn(4, 16), torch.tensor([0, 1, 2, 0])), 4)) == {}
    assert live.largest == 512 * 16


def test_streaming_never_holds_the_gradients_of_a_batch(monkeypatch):
    module = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))
    batch, size = (torch.randn(32, 16), torch.randint(0, 3, (32,))), 32
    monkeypatch.setattr(projector, "_CPU_BYTES", 2 * 64 * 64 * 4)  # two examples of the largest parameter
    engine = HookEngine(module, ClassificationMargin(), select_parameters(module))
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    bound = SparseProjection(32).bind(shapes, 0, 0, torch.device("cpu"))
    engine.project(
        ExampleBatch(batch, size), bound, torch.zeros(size, 32)
    )  # makes the projection, which is as large as the model
    with _Live() as live:
        engine.project(ExampleBatch(batch, size), bound, torch.zeros(size, 32))
    assert live.largest <= 2 * 64 * 64
    with _Live() as live:
        engine(ExampleBatch(batch, size))
    assert live.largest >= size * 64 * 64


def test_a_large_matrix_is_not_formed():
    """Its fold is a product of two smaller matrices."""
    module = nn.Sequential(nn.Linear(1024, 512), nn.Tanh(), nn.Linear(512, 3))
    batch = ExampleBatch((torch.randn(4, 1024), torch.tensor([0, 1, 2, 0])), 4)
    engine = HookEngine(module, ClassificationMargin(), select_parameters(module))
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    bound = SparseProjection(32).bind(shapes, 0, 0, torch.device("cpu"))
    engine.project(batch, bound, torch.zeros(4, 32))  # draws the signs
    with _Live() as live:
        engine.project(batch, bound, torch.zeros(4, 32))
    assert live.largest <= 4 * bound.folds["0.weight"].size <= 4 * 1024 * 512 / 3


class _Counted(TorchDispatchMode):
    """How often operations ran, by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_gradients_of_small_layers_are_added_by_one_operation():
    """And for one position, they take no matrix products, which are slow if they are small."""
    module = nn.Sequential(*(nn.Linear(8, 8) for _ in range(10)), nn.Linear(8, 3))
    batch = ExampleBatch((torch.randn(4, 8), torch.tensor([0, 1, 2, 0])), 4)
    engine = HookEngine(module, ClassificationMargin(), select_parameters(module))
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    bound = SparseProjection(32).bind(shapes, 0, 0, torch.device("cpu"))
    engine.project(batch, bound, torch.zeros(4, 32))  # draws the signs
    with _Counted() as counted:
        engine.project(batch, bound, torch.zeros(4, 32))
    assert counted.counts["scatter_add_"] == 1
    assert counted.counts["bmm"] == 0


def test_a_few_rows_of_all_examples_are_formed_together(monkeypatch):
    """So that the sign of an element is looked up, or drawn, once for the batch."""
    module = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 3))
    batch, size = (torch.randn(8, 16), torch.randint(0, 3, (8,))), 8
    monkeypatch.setattr("lightning_trak.projections.sparse._SUMS", 32)
    monkeypatch.setattr(projector, "_CPU_ROWS", 4)
    monkeypatch.setattr(projector, "_CPU_BYTES", 8 * 4 * 64 * 4)
    drawn = []
    block = SparseProjection.block
    monkeypatch.setattr(SparseProjection, "block", lambda *args: drawn.append(len(args[2])) or block(*args))
    engine = HookEngine(module, ClassificationMargin(), select_parameters(module))
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    bound = SparseProjection(32, cache_bytes=0).bind(shapes, 0, 0, torch.device("cpu"))
    with _Live() as live:
        engine.project(ExampleBatch(batch, size), bound, torch.zeros(size, 32))
    assert sum(drawn) == sum(parameter.numel() for parameter in module.parameters())
    assert live.largest <= 8 * 4 * 64


def test_an_embedding_costs_what_a_text_is_long(monkeypatch):
    """Most rows of its gradient are zero, and are not formed."""
    module = nn.Sequential(nn.Embedding(5000, 4), nn.Flatten(), nn.Linear(24, 3))
    batch, size = (torch.randint(0, 5000, (8, 6)), torch.randint(0, 3, (8,))), 8
    engine = HookEngine(module, ClassificationMargin(), select_parameters(module))
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    bound = SparseProjection(32).bind(shapes, 0, 0, torch.device("cpu"))
    engine.project(ExampleBatch(batch, size), bound, torch.zeros(size, 32))  # looks at shapes of outputs once
    with _Live() as live:
        engine.project(ExampleBatch(batch, size), bound, torch.zeros(size, 32))
    assert live.largest < 5000


def test_only_the_layers_asked_for_are_hooked():
    module, output, batch, size = specimen("mlp", torch.float64)
    names = select_parameters(module, ["2.weight", "0.bias"])
    assert_agrees_with_loop(module, output, batch, size, names)
    module.requires_grad_(False)
    assert_agrees_with_loop(module, output, batch, size, select_parameters(module, "0.*"))


class _Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, hidden, mask):
        return self.head(self.encoder(hidden, src_key_padding_mask=mask)[:, 0])


def test_a_fused_encoder_is_taken_apart():
    """With nothing to differentiate below it, torch would run the encoder in kernels that call no module."""
    torch.manual_seed(0)
    mask = torch.arange(5) >= torch.tensor([[5], [3], [4]])
    batch = (torch.randn(3, 5, 8).double(), mask, torch.tensor([0, 1, 2]))
    module = _Encoder().double().eval()
    names = select_parameters(module, ["*linear*", "*norm*", "head.*"])
    assert_agrees_with_loop(module, ClassificationMargin(), batch, 3, names)
    assert torch.backends.mha.get_fastpath_enabled()


class _Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 5), nn.Tanh())
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(checkpoint(self.body, x, use_reentrant=False))


def test_activation_checkpointing():
    torch.manual_seed(0)
    batch = (torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 0, 1]))
    assert_agrees_with_loop(_Checkpointed().double(), ClassificationMargin(), batch, 5)


def test_compiled_submodules():
    module, output, batch, size = specimen("mlp", torch.float64)
    expected = LoopEngine(module, output, select_parameters(module))(ExampleBatch(batch, size))[1]
    compiled = nn.Sequential(torch.compile(module[0], backend="eager"), module[1], module[2])
    compiled.requires_grad_(False)
    compiled(batch[0])  # compiled before any hook is there, and kept: torch does not look for new hooks
    compiled.requires_grad_(True)
    assert_same(HookEngine(compiled, output, select_parameters(compiled))(ExampleBatch(batch, size))[1], expected)


def test_frozen_and_unused_parts_have_zero_gradients():
    class Partial(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.unused, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            with torch.no_grad():
                x = self.base(x)
            return self.head(x)

    module = Partial()
    batch = (torch.randn(3, 4), torch.tensor([0, 1, 2]))
    names = select_parameters(module)
    rows = HookEngine(module, ClassificationMargin(), names)(ExampleBatch(batch, 3))[1]
    assert [name for name, row in rows.items() if not row.any()] == [
        "base.weight", "base.bias", "unused.weight", "unused.bias"
    ]  # fmt: skip
    assert rows["base.weight"].shape == (3, 16)
    rows = HookEngine(module, ClassificationMargin(), select_parameters(module, "base.*"))(ExampleBatch(batch, 3))[1]
    assert not rows["base.weight"].any()


def test_losses_of_any_kind():
    module, output, batch, size = specimen("own_loss", torch.float64)
    assert isinstance(output, NegativeLoss)
    assert_agrees_with_loop(module, output, batch, size)
