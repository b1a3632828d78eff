"""ExactKernel against TRAK without a projection, and what it must refuse or survive."""

import warnings

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_trak import TRAK
from lightning_trak.features.store import FeatureStore
from lightning_trak.methods import ExactKernel
from lightning_trak.outputs import ClassificationMargin
from lightning_trak.projections import IdentityProjection
from lightning_trak.scoring.newton import exact_kernel as module_of_kernel
from tests.lit import TARGETS, TRAIN, beyond_hooks, make_checkpoints, make_model, make_trainer, open_store


def exact_and_trak(
    tmp_path, model, train, targets, checkpoints=None, loader=lambda data: DataLoader(data, 8), **options
):
    """Scores of both, on the same data."""
    found = []
    for name, method, more in [("exact", ExactKernel, {}), ("trak", TRAK, {"projection": IdentityProjection()})]:
        made = method(model, checkpoints or [model.state_dict()], tmp_path / name, **more, **options)
        found.append((made, made.attribute(make_trainer(), loader(train), loader(targets))))
    return found


def assert_close(found, expected, tolerance=1e-5):
    assert float((found - expected).abs().max() / expected.abs().max()) < tolerance


@pytest.fixture(scope="module")
def checkpoints():
    return make_checkpoints(2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"curvature": "identity", "damping": 0.01},
        {"loss_gradients": "averaged", "soft_threshold": 1e-3},
        {"parameters": ["first.weight", "norm.*"]},
        {"engine": "loop", "dtype": torch.float64},
    ],
)
@pytest.mark.slow
def test_scores_are_those_of_trak_without_a_projection(tmp_path, checkpoints, options):
    parts = Subset(TRAIN, range(16)), Subset(TARGETS, range(5))
    (_, found), (_, expected) = exact_and_trak(tmp_path, make_model(), *parts, checkpoints, **options)
    assert_close(found, expected)


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(40, 12)
        layer = nn.TransformerEncoderLayer(12, 2, 24, dropout=0.0, batch_first=True)
        self.mixed = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 3)

    def forward(self, ids):
        return self.head(self.norm(self.mixed(self.tokens(ids)).mean(1)))


def images():
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, stride=2, padding=1), nn.GroupNorm(2, 8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.Flatten(),
        nn.Linear(64, 3),
    )  # fmt: skip


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


@pytest.mark.parametrize("kind", ["text", "images"])
@pytest.mark.slow
def test_sequences_and_convolutions(tmp_path, kind):
    generator = torch.Generator().manual_seed(0)
    inputs = (
        torch.randint(0, 40, (20, 4), generator=generator)
        if kind == "text"
        else torch.randn(20, 2, 8, 8, generator=generator)
    )
    data = TensorDataset(inputs, torch.randint(0, 3, (20,), generator=generator))
    model = seeded(Text if kind == "text" else images)
    parts = Subset(data, range(16)), Subset(data, range(16, 20))
    (exact, found), (trak, expected) = exact_and_trak(tmp_path, model, *parts, output=ClassificationMargin())
    assert_close(found, expected)
    sizes = [open_store(method, make_trainer()).read(0, 0).features.shape[1] for method in (exact, trak)]
    assert sizes[0] < 0.7 * sizes[1]


def test_more_examples_than_parameters(tmp_path):
    data = TensorDataset(torch.randn(30, 3), torch.randint(0, 2, (30,)))
    model = seeded(lambda: nn.Linear(3, 2))
    (_, found), (_, expected) = exact_and_trak(tmp_path, model, data, data, output=ClassificationMargin())
    assert_close(found, expected)


@pytest.mark.slow
def test_batches_shards_and_workers_do_not_matter(tmp_path, checkpoints):
    scores = []
    for number, (batch, shard) in enumerate([(25, 50), (10, 10)]):
        exact = ExactKernel(make_model(), checkpoints, tmp_path / str(number))
        exact.featurize(make_trainer(), DataLoader(TRAIN, batch, shuffle=True), shard)
        scores.append(exact.score(make_trainer(), DataLoader(TARGETS, batch)))
    assert_close(scores[1], scores[0])


@pytest.mark.slow
def test_top_k_self_influence_and_trainer_predict(tmp_path, checkpoints):
    exact, trainer = ExactKernel(make_model(), checkpoints, tmp_path), make_trainer()
    exact.featurize(trainer, TRAIN)
    full = exact.score(trainer, TARGETS)
    for largest in (True, False):
        top, expected = exact.score(trainer, TARGETS, 4, largest), full.topk(4, largest=largest)
        assert torch.equal(top.values, expected.values)
        assert torch.equal(top.indices, expected.indices)
    assert_close(torch.cat(trainer.predict(exact.scorer(), DataLoader(TARGETS, batch_size=5))), full)
    assert_close(exact.self_influence(trainer), exact.score(trainer, TRAIN).diagonal())


def test_the_features_of_targets_are_their_gradients(tmp_path, checkpoints):
    found = []
    for method, more in [(ExactKernel, {}), (TRAK, {"projection": IdentityProjection()})]:
        made = method(make_model(), checkpoints, tmp_path / method.__name__, **more)
        made.featurize(make_trainer(), Subset(TRAIN, range(9)))
        found.append(made.target_features(make_trainer(), TARGETS))
    for exact, trak in zip(*found, strict=True):
        torch.testing.assert_close(exact.features, trak.features)


def small_blocks(monkeypatch):
    monkeypatch.setattr(module_of_kernel, "shard_blocks", lambda shards, size: [range(i, i + 1) for i in range(shards)])


@pytest.mark.slow
def test_an_interrupted_kernel_is_continued(tmp_path, monkeypatch, checkpoints):
    small_blocks(monkeypatch)
    exact, write, made = ExactKernel(make_model(), checkpoints, tmp_path), FeatureStore.write_extra, []

    def fails(self, checkpoint, name, *args):
        if name.startswith("kernel"):
            made.append((checkpoint, name))
            if len(made) == 6:
                raise OSError("the disk is full")
        write(self, checkpoint, name, *args)

    monkeypatch.setattr(FeatureStore, "write_extra", fails)
    with pytest.raises(OSError, match="disk is full"):
        exact.featurize(make_trainer(), DataLoader(TRAIN, 10), 10)
    exact.featurize(make_trainer(), DataLoader(TRAIN, 10), 10)
    assert len(made) == 11  # five blocks at each of two checkpoints, and the one that failed
    scores = exact.score(make_trainer(), TARGETS)
    assert len(made) == 11
    file = max(tmp_path.rglob("kernel-00002.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.warns(UserWarning, match="counts as lost"):
        again = exact.score(make_trainer(), TARGETS)
    assert len(made) == 12
    assert torch.equal(again, scores)


def test_a_kernel_of_other_gradients_is_made_again(tmp_path, checkpoints):
    exact = ExactKernel(make_model(), checkpoints, tmp_path)
    exact.featurize(make_trainer(), TRAIN)
    scores, store = exact.score(make_trainer(), TARGETS), open_store(exact, make_trainer())
    rows = store.read(0, 0)
    store.write(0, 0, rows._replace(features=rows.features * 2), store.engine_of(0, 0))
    assert not torch.allclose(exact.score(make_trainer(), TARGETS), scores)


def test_wrong_products_are_refused(tmp_path, monkeypatch, checkpoints):
    exact, right = ExactKernel(make_model(), checkpoints, tmp_path), module_of_kernel.inner_products
    monkeypatch.setattr(module_of_kernel, "inner_products", lambda *args: 1.01 * right(*args))
    with pytest.raises(RuntimeError, match=r"an inner product of two gradients is .* use another device"):
        exact.featurize(make_trainer(), TRAIN)
    assert not list(tmp_path.rglob("kernel-*"))


def test_hooks_that_get_a_gradient_wrong_are_refused(tmp_path, monkeypatch):
    from lightning_trak.gradients.hooks.layers import LinearLayer

    right = LinearLayer.factors
    monkeypatch.setattr(LinearLayer, "factors", lambda self, call: (right(self, call)[0] * 1.1, right(self, call)[1]))
    exact = ExactKernel(make_model(), [make_model().state_dict()], tmp_path, engine="hooks")
    with pytest.raises(ValueError, match=r"gradient is off by .* in first\.weight"):
        exact.featurize(make_trainer(), TRAIN)


def test_stores_of_other_methods_are_refused(tmp_path, checkpoints):
    TRAK(make_model(), checkpoints, tmp_path, projection=IdentityProjection()).featurize(make_trainer(), TRAIN)
    with pytest.raises(ValueError, match=r"was made with another projection, this ExactKernel has one that differs"):
        ExactKernel(make_model(), checkpoints, tmp_path).score(make_trainer(), TARGETS)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"damping": 0}, "damping must be more than 0"),
        ({"damping": float("nan")}, "damping"),
        ({"curvature": "none"}, "curvature"),
        ({"loss_gradients": "none"}, "loss_gradients"),
        ({"dtype": torch.bfloat16}, "dtype"),
    ],
)
def test_arguments_are_checked(tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        ExactKernel(make_model(), [make_model().state_dict()], tmp_path / "store", **options)
    assert not (tmp_path / "store").exists()


class Lengths(torch.utils.data.Dataset):
    def __init__(self, lengths):
        self.lengths = lengths

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.randint(1, 40, (self.lengths[index],), generator=generator), index % 3


def padded(items):
    ids = nn.utils.rnn.pad_sequence([ids for ids, _ in items], batch_first=True)
    return ids, torch.tensor([label for _, label in items])


class MaskedText(Text):
    def forward(self, ids):
        mask = ids != 0
        hidden = self.mixed(self.tokens(ids), src_key_padding_mask=~mask) * mask.unsqueeze(2)
        return self.head(self.norm(hidden.sum(1) / mask.sum(1, keepdim=True)))


@pytest.mark.slow
def test_examples_of_several_lengths(tmp_path):
    def loader(data):
        return DataLoader(data, 4, collate_fn=padded)

    data, model = Lengths([4, 2, 3, 1] * 2), seeded(MaskedText)
    output = ClassificationMargin()
    (exact, found), (_, expected) = exact_and_trak(tmp_path, model, data, data, loader=loader, output=output)
    assert_close(found, expected)
    with pytest.raises(ValueError, match=r"is used at 5 positions of an example, but at 4 of the first"):
        exact.score(make_trainer(), loader(Lengths([5, 5])))


def test_models_that_hooks_do_not_cover(tmp_path):
    parts = Subset(TRAIN, range(16)), Subset(TARGETS, range(5))
    (_, found), (_, expected) = exact_and_trak(tmp_path, beyond_hooks(make_model()), *parts)
    assert_close(found, expected)


def test_everything_is_left_as_it_was(tmp_path, checkpoints):
    model, trainer = make_model().train(), make_trainer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ExactKernel(model, checkpoints, tmp_path).attribute(trainer, DataLoader(TRAIN, 50), DataLoader(TARGETS, 50))
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert isinstance(trainer, L.Trainer)


def test_there_is_nothing_to_rescore(tmp_path, checkpoints):
    exact, trainer = ExactKernel(make_model(), checkpoints, tmp_path), make_trainer()
    exact.featurize(trainer, TRAIN)
    with pytest.raises(ValueError, match="ExactKernel are exact already: leave rescore= out"):
        exact.score(trainer, TARGETS, top_k=3, rescore=10)
