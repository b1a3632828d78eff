"""The facade end to end."""

import copy
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lightning_trak import TRAK
from lightning_trak.gradients import LoopEngine, select_parameters
from lightning_trak.gradients.batch import ExampleBatch
from lightning_trak.methods import GradientCosine, GradientDot
from lightning_trak.outputs import ClassificationMargin
from lightning_trak.projections import GaussianProjection, IdentityProjection, KroneckerProjection, SparseProjection
from lightning_trak.running.data import content
from tests.lit import TARGETS, TRAIN, LitNet, attribute, beyond_hooks, make_data, make_model, make_trainer, open_store
from tests.zoo import ZOO, specimen


@pytest.mark.slow
def test_engines_and_shard_sizes_agree(tmp_path, checkpoints, expected):
    for engine, shard_size in (("functional", 3), ("hooks", 7), ("loop", 50)):
        trak = TRAK(make_model(), checkpoints, tmp_path / engine, projection=SparseProjection(32), engine=engine)
        trak.featurize(make_trainer(), DataLoader(TRAIN, batch_size=8), shard_size=shard_size)
        scores = trak.score(make_trainer(), TARGETS)
        torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_target_features_are_the_rows_that_the_store_would_hold(tmp_path, checkpoints):
    """Training examples as targets: the store's own rows, on axes that are fitted to the training set alone."""
    projection = KroneckerProjection(3, 3, axes="principal")
    trak = TRAK(make_model(), checkpoints, tmp_path, projection=projection, engine="hooks")
    trak.featurize(make_trainer(), DataLoader(TRAIN, batch_size=8), shard_size=8)
    some = Subset(TRAIN, [5, 1, 17])
    store = open_store(trak, make_trainer())
    for checkpoint, found in enumerate(trak.target_features(make_trainer(), some)):
        stored = [store.read(checkpoint, shard) for shard in range(store.num_shards)]
        for column, columns in zip(found, zip(*stored, strict=True), strict=True):
            torch.testing.assert_close(column, torch.cat(columns)[[5, 1, 17]])


@pytest.mark.parametrize("inference_mode", [True, False])
def test_inference_mode_makes_no_difference(tmp_path, checkpoints, expected, inference_mode):
    scores = attribute(tmp_path, checkpoints, trainer=make_trainer(inference_mode=inference_mode))
    assert torch.equal(scores, expected)


def test_calls_in_inference_mode_give_the_same(tmp_path, checkpoints, expected):
    """As in the hooks of a module that Lightning tests or validates."""
    trak = TRAK(make_model(), checkpoints, tmp_path, projection=SparseProjection(32))
    with torch.inference_mode():
        assert torch.equal(trak.attribute(make_trainer(), TRAIN, TARGETS), expected)


def test_checkpoints_of_every_kind_agree(tmp_path, checkpoints, expected):
    torch.save({"state_dict": checkpoints[0]}, tmp_path / "a.ckpt")
    scores = attribute(tmp_path, [tmp_path / "a.ckpt", checkpoints[1]])
    assert torch.equal(scores, expected)


def test_scores_average_over_checkpoints(tmp_path, checkpoints):
    """With IdentityProjection and a fixed damping nothing depends on the checkpoint's number."""
    options = {"engine": "functional", "damping": 1.0}
    both = [
        TRAK(make_model(), chosen, tmp_path / name, projection=IdentityProjection(), **options)
        for name, chosen in (("ab", checkpoints), ("a", checkpoints[:1]), ("b", checkpoints[1:]))
    ]
    results = []
    for trak in both:
        trak.featurize(make_trainer(), TRAIN)
        results.append(trak.score(make_trainer(), TARGETS))
    torch.testing.assert_close(results[0], (results[1] + results[2]) / 2)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float16, 0.01),
        ("bfloat16", 0.05),
        ("float64", 1e-4),
        ("int8", 0.03),
        ("int4", 0.2),
    ],
)
def test_stored_dtypes(tmp_path, checkpoints, expected, dtype, tolerance):
    scores = attribute(tmp_path, checkpoints, dtype=dtype)
    assert scores.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    assert float((scores - expected).abs().max() / expected.abs().max()) < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_integers_on_disk_are_shared_continued_and_no_other_bits(tmp_path, checkpoints, dtype):
    """The same bits whatever the batches, and after an interruption; each method reads them."""
    options = {"projection": SparseProjection(33), "dtype": dtype}
    stores = []
    for name, batch_size in (("a", 4), ("b", 8)):
        trak = TRAK(make_model(), checkpoints, tmp_path / name, **options)
        trak.featurize(make_trainer(), DataLoader(TRAIN, batch_size=batch_size), shard_size=8)
        found = (tmp_path / name).rglob("shard-*")
        stores.append({path.relative_to(tmp_path / name): path for path in found})
    scores = trak.score(make_trainer(), TARGETS)
    for shard, path in stores[0].items():
        first, second = (load_file(found) for found in (path, stores[1][shard]))
        assert first["features"].dtype == (torch.int8 if dtype == "int8" else torch.uint8)
        differing = (first["features"] != second["features"]).float().mean()  # products are rounded by batch
        assert float(differing) < 0.01
    before = {path: load_file(path) for path in stores[0].values()}
    for path in list(before)[::3]:
        path.unlink()
    TRAK(make_model(), checkpoints, tmp_path / "a", **options).featurize(make_trainer(), DataLoader(TRAIN, 4))
    for path, tensors in before.items():
        assert all(torch.equal(again, tensors[key]) for key, again in load_file(path).items())
    floats = {"projection": SparseProjection(33)}
    TRAK(make_model(), checkpoints, tmp_path / "f", **floats).featurize(make_trainer(), TRAIN)
    for method in (GradientDot, GradientCosine):
        other = method(make_model(), checkpoints, tmp_path / "b", effect_on="output", **options)
        exact = method(make_model(), checkpoints, tmp_path / "f", effect_on="output", **floats)
        found, expected = (one.score(make_trainer(), TARGETS) for one in (other, exact))
        assert float((found - expected).norm() / expected.norm()) < (0.02 if dtype == "int8" else 0.2)
    mine = torch.cat(make_trainer().predict(trak.scorer(), DataLoader(TARGETS, batch_size=5)))
    torch.testing.assert_close(mine, scores, rtol=1e-4, atol=1e-5)
    top = trak.score(make_trainer(), TARGETS, top_k=3)
    assert torch.equal(top.indices, scores.topk(3).indices)
    assert trak.self_influence(make_trainer()).isfinite().all()


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_a_store_of_integers_notices_other_data(tmp_path, checkpoints, dtype, monkeypatch):
    """Items that are not among those of the manifest have changed: their features differ from what is stored."""
    monkeypatch.setattr(content, "MANY", 8)
    TRAK(make_model(), checkpoints[:1], tmp_path, projection=SparseProjection(32), dtype=dtype).featurize(
        make_trainer(), TRAIN, shard_size=5
    )
    next(tmp_path.rglob("shard-00000.safetensors")).unlink()
    changed = TensorDataset(*(column.clone() for column in TRAIN.tensors))
    changed.tensors[0][5:7] += 0.3
    trak = TRAK(make_model(), checkpoints[:1], tmp_path, projection=SparseProjection(32), dtype=dtype)
    with pytest.raises(ValueError, match=r"examples 5 to 6 now have other (outputs|features)"):
        trak.featurize(make_trainer(), changed)


@pytest.mark.parametrize("largest", [True, False])
def test_top_k(tmp_path, checkpoints, expected, largest):
    top = attribute(tmp_path, checkpoints, score={"top_k": 4, "largest": largest})
    best = expected.topk(4, largest=largest)
    assert torch.equal(top.indices, best.indices)
    torch.testing.assert_close(top.values, best.values)


@pytest.mark.slow
def test_top_k_never_holds_the_full_matrix(tmp_path, checkpoints, monkeypatch):
    """The largest tensor made while scoring, counted by a dispatch mode, is far below num_targets x num_train."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self.numel = max(self.numel, leaf.numel())
            return result

    train, targets = make_data(4000), make_data(200, seed=1)
    trak = TRAK(make_model(), checkpoints, tmp_path, projection=SparseProjection(16))
    trak.featurize(make_trainer(), DataLoader(train, batch_size=100), shard_size=100)
    seen = {}
    for top_k in (5, None):
        with Largest() as largest:
            trak.score(make_trainer(), DataLoader(targets, batch_size=50), top_k=top_k)
        seen[top_k] = largest.numel
    assert seen[None] >= 200 * 4000  # the count sees the full matrix when there is one
    assert seen[5] <= 200 * 100


def test_blocks_of_targets_change_nothing(tmp_path, checkpoints, expected, monkeypatch):
    monkeypatch.setattr("lightning_trak.scoring.targets.TARGET_BYTES", 3 * 32 * 4 * 2)
    scores = attribute(tmp_path, checkpoints, targets=DataLoader(TARGETS, batch_size=3))
    torch.testing.assert_close(scores, expected)
    top = attribute(tmp_path, checkpoints, targets=DataLoader(TARGETS, batch_size=3), score={"top_k": 2})
    assert top.indices.shape == (13, 2)
    assert torch.equal(top.indices, expected.topk(2).indices)


def test_blocks_of_gradients_change_nothing(tmp_path, checkpoints, expected, monkeypatch):
    monkeypatch.setattr("lightning_trak.features.extractor.GRADIENT_BYTES", 1000)
    torch.testing.assert_close(attribute(tmp_path, checkpoints), expected)


def test_scorer_in_trainer_predict(tmp_path, checkpoints, expected):
    trainer = make_trainer()
    trak = TRAK(make_model(), checkpoints, tmp_path, projection=SparseProjection(32))
    trak.featurize(trainer, TRAIN)
    parts = trainer.predict(trak.scorer(), DataLoader(TARGETS, batch_size=5))
    assert [len(part) for part in parts] == [5, 5, 3]
    torch.testing.assert_close(torch.cat(parts), expected)
    loaders = [DataLoader(TARGETS, batch_size=13), DataLoader(TARGETS, batch_size=5, shuffle=True)]
    several = trainer.predict(trak.scorer(top_k=2, largest=False), loaders)
    assert torch.equal(several[0][0].indices, expected.topk(2, largest=False).indices)
    assert [tuple(part.values.shape) for part in several[1]] == [(5, 2), (5, 2), (3, 2)]


def test_paper_shares_a_store_and_differs(tmp_path, checkpoints, expected):
    trainer = make_trainer()
    attribute(tmp_path, checkpoints)
    paper = TRAK.paper(make_model(), checkpoints, tmp_path / "store", projection=SparseProjection(32), damping=0.01)
    assert not torch.allclose(paper.score(trainer, TARGETS), expected)
    paper = TRAK.paper(make_model(), checkpoints, tmp_path / "x")
    assert (paper.curvature, paper.damping, paper.loss_gradients) == ("identity", 0.0, "averaged")
    assert paper.settings.projection == GaussianProjection(2048)
    again = TRAK.paper(make_model(), checkpoints, tmp_path / "x", projection=None)
    assert again.settings.projection == paper.settings.projection


def test_only_chosen_parameters(tmp_path, checkpoints):
    store = tmp_path / "store"
    trak = TRAK(make_model(), checkpoints, store, projection=IdentityProjection(), parameters="head.*", damping=0.1)
    trak.featurize(make_trainer(), TRAIN)
    assert trak.score(make_trainer(), TARGETS).shape == (13, 50)
    features = next(store.rglob("shard-00000.safetensors"))
    assert load_file(features)["features"].shape[1] == 8 * 3 + 3


def test_a_plain_module_with_an_output(tmp_path):
    module = nn.Linear(6, 3)
    trak = TRAK(module, [module.state_dict()], tmp_path, output=ClassificationMargin(), projection=IdentityProjection())
    trak.featurize(make_trainer(), TRAIN)
    assert trak.score(make_trainer(), TARGETS).shape == (13, 50)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["auto", "hooks", "loop"])
@pytest.mark.parametrize("name", ZOO)
def test_every_architecture_end_to_end(tmp_path, name, engine):
    """Under inference mode, from a real loader, against features computed by hand."""
    module, output, batch, size = specimen(name)
    if output.context_size:
        output = type(output)(context_size=3)
    examples = [copy.copy(part) for part in _unstack(batch, size)]
    loader = DataLoader(_Listed(examples), batch_size=2, collate_fn=lambda items: _stack(items, batch))
    trak = TRAK(
        module,
        [module.state_dict()],
        tmp_path,
        output=output,
        projection=IdentityProjection(),
        curvature="identity",
        engine=engine,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        trak.featurize(make_trainer(), loader)
        scores = trak.score(make_trainer(), loader)
    assert scores.shape == (size, size)
    assert bool(scores.isfinite().all())
    if output.context_size:
        output.set_context(load_file(next(tmp_path.rglob("context.safetensors"))))
    _, gradients = LoopEngine(module, output, select_parameters(module))(ExampleBatch(batch, size))
    found = torch.cat([load_file(path)["features"] for path in sorted(tmp_path.rglob("shard*"))])
    torch.testing.assert_close(found, torch.cat(list(gradients.values()), dim=1), rtol=1e-3, atol=1e-5)


def _unstack(batch, size):
    if isinstance(batch, torch.Tensor):
        return list(batch)
    if isinstance(batch, dict):
        return [{key: value[i] for key, value in batch.items()} for i in range(size)]
    return [tuple(part[i] for part in batch) for i in range(size)]


def _stack(items, like):
    if isinstance(like, torch.Tensor):
        return torch.stack(items)
    if isinstance(like, dict):
        return {key: torch.stack([item[key] for item in items]) for key in like}
    return tuple(torch.stack(parts) for parts in zip(*items, strict=True))


class _Listed(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class Untraceable(LitNet):
    def forward(self, inputs):
        return super().forward(inputs if inputs.sum().item() < 1e9 else inputs * 0)


def test_auto_falls_back_to_the_loop_and_says_so(tmp_path, checkpoints, expected):
    trak = TRAK(beyond_hooks(Untraceable()), checkpoints, tmp_path / "auto", projection=SparseProjection(32))
    with pytest.warns(UserWarning, match=r"vmap cannot differentiate Untraceable.*\.item\(\)"):
        trak.featurize(make_trainer(), TRAIN)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*vmap cannot.*")  # once is enough
        scores = trak.score(make_trainer(), TARGETS)
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    strict = TRAK(Untraceable(), checkpoints, tmp_path / "f", projection=SparseProjection(32), engine="functional")
    with pytest.raises(ValueError, match=r"engine='functional' cannot differentiate this model correctly.*\.item\(\)"):
        strict.featurize(make_trainer(), TRAIN)


@pytest.mark.parametrize("engine", ["hooks", "functional", "loop"])
def test_mixed_precision_is_for_hooks(tmp_path, checkpoints, expected, engine):
    scores = attribute(tmp_path, checkpoints, trainer=make_trainer(precision="bf16-mixed"), engine=engine)
    if engine == "hooks":
        assert not torch.equal(scores, expected)
        assert float((scores - expected).norm() / expected.norm()) < 0.1
    else:
        torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_true_half_precision_of_the_trainer_is_used(tmp_path, checkpoints, expected):
    trainer = make_trainer(precision="bf16-true")
    scores = attribute(tmp_path, checkpoints, trainer=trainer, engine="functional")
    assert not torch.equal(scores, expected)
    assert float((scores - expected).norm() / expected.norm()) < 0.1


class Bypassing(LitNet):
    """Uses the head's weight behind the back of the head's forward."""

    def forward(self, inputs):
        hidden = torch.tanh(self.norm(self.first(inputs)))
        return (self.head(hidden) + torch.nn.functional.linear(hidden, self.head.weight)) * self.scale


def test_hooks_that_would_miss_a_gradient_are_refused(tmp_path, checkpoints):
    trak = TRAK(Bypassing(), checkpoints, tmp_path, projection=SparseProjection(32), engine="hooks")
    with pytest.raises(ValueError, match=r"engine='hooks' cannot differentiate this model correctly: head"):
        trak.featurize(make_trainer(), TRAIN)


def test_hooks_that_cover_nothing_are_refused(tmp_path):
    module = nn.LSTM(6, 3)
    trak = TRAK(module, [module.state_dict()], tmp_path, output=ClassificationMargin(), engine="hooks")
    with pytest.raises(ValueError, match="engine='hooks' cannot be used here: hooks cover 0 of 4"):
        trak.featurize(make_trainer(), TRAIN)


def test_scores_at_several_dampings_are_those_of_each_alone(tmp_path, checkpoints):
    options = {"projection": SparseProjection(32), "soft_threshold": 1e-3}
    trak = TRAK(make_model(), checkpoints, tmp_path, **options)
    trak.featurize(make_trainer(), TRAIN)
    found = trak.score_dampings(make_trainer(), TARGETS, ["auto", 0.1, 3])
    assert list(found) == ["auto", 0.1, 3]
    for damping, scores in found.items():
        alone = TRAK(make_model(), checkpoints, tmp_path, damping=damping, **options)
        torch.testing.assert_close(scores, alone.score(make_trainer(), TARGETS))
    assert trak.damping == "auto"
    assert not torch.allclose(found[0.1], found[3])


@pytest.mark.parametrize(
    ("dampings", "match"), [([], "a sequence of dampings"), ("auto", "a sequence of dampings"), ([1, -1], "at least 0")]
)
def test_dampings_to_score_with_are_checked_first(tmp_path, checkpoints, dampings, match):
    with pytest.raises(ValueError, match=match):
        TRAK(make_model(), checkpoints, tmp_path).score_dampings(make_trainer(), TARGETS, dampings)
