"""The facade end to end: the same result however the data comes, and everything as it was afterwards."""

import copy
import random
import warnings

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_trak import TRAK
from lightning_trak.gradients import LoopEngine, select_parameters
from lightning_trak.outputs import ClassificationMargin, NegativeLoss
from lightning_trak.projections import GaussianProjection, IdentityProjection, SparseProjection
from tests.lit import LitNet, make_checkpoints, make_data, make_model, make_trainer
from tests.zoo import ZOO, specimen

TRAIN, TARGETS = make_data(50), make_data(13, seed=1)


@pytest.fixture(scope="module")
def checkpoints():
    return make_checkpoints(2)


def attribute(tmp_path, checkpoints, train=TRAIN, targets=TARGETS, trainer=None, name="store", score=None, **options):
    trak = TRAK(make_model(), checkpoints, tmp_path / name, projection=SparseProjection(32), **options)
    trainer = trainer or make_trainer()
    trak.featurize(trainer, train)
    return trak.score(trainer, targets, **(score or {}))


@pytest.fixture(scope="module")
def expected(checkpoints, tmp_path_factory):
    return attribute(tmp_path_factory.mktemp("expected"), checkpoints)


def with_batch_sampler(data):
    return DataLoader(data, batch_sampler=BatchSampler(WeightedRandomSampler([1.0] * len(data), len(data)), 9, True))


def as_dicts(batch):
    return {"x": torch.stack([x for x, _ in batch]), "labels": torch.stack([y for _, y in batch])}


class Data(L.LightningDataModule):
    def setup(self, stage):
        self.stage = stage

    def train_dataloader(self):
        assert self.stage == "fit"
        return DataLoader(TRAIN, batch_size=11, shuffle=True)

    def predict_dataloader(self):
        assert self.stage == "predict"
        return DataLoader(TARGETS, batch_size=4)


@pytest.mark.parametrize(
    "train",
    [
        DataLoader(TRAIN, batch_size=1),
        DataLoader(TRAIN, batch_size=7),
        DataLoader(TRAIN, batch_size=500),
        DataLoader(TRAIN, batch_size=16, shuffle=True, drop_last=True),
        DataLoader(TRAIN, batch_size=16, num_workers=2, persistent_workers=True),
        DataLoader(TRAIN, batch_size=8, sampler=torch.utils.data.DistributedSampler(TRAIN, 3, 1)),
        with_batch_sampler(TRAIN),
        DataLoader(Subset(TRAIN, range(50)), batch_size=8),
        Data(),
    ],
    ids=["one", "seven", "all", "shuffled", "workers", "distributed", "batch_sampler", "subset", "datamodule"],
)
def test_scores_do_not_depend_on_how_the_data_comes(tmp_path, checkpoints, expected, train):
    targets = train if isinstance(train, Data) else DataLoader(TARGETS, batch_size=5, shuffle=True)
    scores = attribute(tmp_path, checkpoints, train, targets)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_engines_and_shard_sizes_agree(tmp_path, checkpoints, expected):
    for engine, shard_size in (("functional", 3), ("loop", 50)):
        trak = TRAK(make_model(), checkpoints, tmp_path / engine, projection=SparseProjection(32), engine=engine)
        trak.featurize(make_trainer(), DataLoader(TRAIN, batch_size=8), shard_size=shard_size)
        scores = trak.score(make_trainer(), TARGETS)
        torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_columns_follow_a_subset(tmp_path, checkpoints, expected):
    chosen = [40, 3, 17, 29, 8]
    rows = attribute(tmp_path, checkpoints, TRAIN, Subset(TARGETS, [12, 0, 5]))
    torch.testing.assert_close(rows, expected[[12, 0, 5]])
    # Damping this large leaves phi(x) phi(i) Q(i), times a factor for each checkpoint.
    scores = attribute(tmp_path, checkpoints[:1], Subset(TRAIN, chosen), name="subset", damping=1e6)
    whole = attribute(tmp_path, checkpoints[:1], TRAIN, name="whole", damping=1e6)
    torch.testing.assert_close(scores / scores.norm(), whole[:, chosen] / whole[:, chosen].norm(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("inference_mode", [True, False])
def test_inference_mode_makes_no_difference(tmp_path, checkpoints, expected, inference_mode):
    scores = attribute(tmp_path, checkpoints, trainer=make_trainer(inference_mode=inference_mode))
    assert torch.equal(scores, expected)


def test_checkpoints_of_every_kind_agree(tmp_path, checkpoints, expected):
    torch.save({"state_dict": checkpoints[0]}, tmp_path / "a.ckpt")
    scores = attribute(tmp_path, [tmp_path / "a.ckpt", checkpoints[1]])
    assert torch.equal(scores, expected)


def test_scores_average_over_checkpoints(tmp_path, checkpoints):
    """With IdentityProjection nothing depends on the checkpoint's number."""
    options = {"engine": "functional"}
    both = [
        TRAK(make_model(), chosen, tmp_path / name, projection=IdentityProjection(), **options)
        for name, chosen in (("ab", checkpoints), ("a", checkpoints[:1]), ("b", checkpoints[1:]))
    ]
    results = []
    for trak in both:
        trak.featurize(make_trainer(), TRAIN)
        results.append(trak.score(make_trainer(), TARGETS))
    torch.testing.assert_close(results[0], (results[1] + results[2]) / 2)


def test_everything_is_as_it_was(tmp_path, checkpoints):
    model = make_model()
    model.train()
    model.norm.eval()  # a mixed mode
    model.first.weight.requires_grad_(False)
    model.head.bias.grad = torch.full((3,), 7.0)
    before = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    identities = {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    modes = {name: module.training for name, module in model.named_modules()}
    logger = CSVLogger(tmp_path / "logs")
    trainer = make_trainer(logger=logger, max_epochs=1)
    trainer.fit(model, DataLoader(make_data(8), batch_size=8))
    after_fit = {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    assert not torch.equal(before["head.weight"], after_fit["head.weight"])
    attributes = set(vars(model))
    model.train()
    model.norm.eval()
    model.head.bias.grad = torch.full((3,), 7.0)
    logged = sorted((path, path.read_bytes()) for path in (tmp_path / "logs").rglob("*") if path.is_file())
    callbacks, loggers, lightning_module = list(trainer.callbacks), list(trainer.loggers), trainer.lightning_module
    torch.manual_seed(3), random.seed(3), np.random.seed(3)  # noqa: NPY002
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002

    trak = TRAK(model, checkpoints, tmp_path / "store", projection=SparseProjection(32))
    trak.featurize(trainer, DataLoader(TRAIN, batch_size=8, shuffle=True, num_workers=1))
    trak.score(trainer, DataLoader(TARGETS, batch_size=8, shuffle=True))
    trak.score(trainer, TARGETS, top_k=3)

    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()  # noqa: NPY002
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert torch.equal(tensor, after_fit[name]), name
        assert id(tensor) == identities[name], name
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert set(vars(model)) == attributes
    assert model.head.bias.grad.tolist() == [7.0] * 3
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True, True, True]
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert trainer.callbacks == callbacks
    assert trainer.loggers == loggers
    assert trainer.lightning_module is lightning_module is model
    assert model.trainer is trainer
    assert sorted((path, path.read_bytes()) for path in (tmp_path / "logs").rglob("*") if path.is_file()) == logged


def test_the_trainer_is_given_back_after_an_error(tmp_path, checkpoints):
    trainer = make_trainer(logger=CSVLogger(tmp_path), callbacks=[L.pytorch.callbacks.Timer()])
    callbacks, loggers = list(trainer.callbacks), list(trainer.loggers)
    bad = TensorDataset(torch.full((5, 6), torch.nan), torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="not finite"):
        attribute(tmp_path, checkpoints, bad, trainer=trainer)
    assert trainer.callbacks == callbacks
    assert trainer.loggers == loggers


def test_the_users_callbacks_do_not_meet_our_predictions(tmp_path, checkpoints):
    class Writer(BasePredictionWriter):
        def __init__(self):
            super().__init__("batch")
            self.calls = 0

        def write_on_batch_end(self, *args):
            self.calls += 1

    writer = Writer()
    attribute(tmp_path, checkpoints, trainer=make_trainer(callbacks=[writer]))
    assert writer.calls == 0


def test_a_bad_example_is_named_and_good_shards_are_kept(tmp_path, checkpoints):
    inputs, labels = (tensor.clone() for tensor in TRAIN.tensors)
    inputs[37, 2] = torch.inf
    trak = TRAK(make_model(), checkpoints, tmp_path / "store", projection=SparseProjection(32))
    with pytest.raises(ValueError, match=r"feature of example 37 at checkpoint 0 \(.*\) is not finite"):
        trak.featurize(make_trainer(), DataLoader(TensorDataset(inputs, labels), batch_size=5), shard_size=10)
    written = sorted(path.name for path in (tmp_path / "store").rglob("shard*"))
    assert written == ["shard-00000.safetensors", "shard-00001.safetensors", "shard-00002.safetensors"]
    with pytest.raises(RuntimeError, match="lacks 7 of 10 shards"):
        trak.score(make_trainer(), TARGETS)


def test_overflow_of_the_stored_dtype_is_an_error(tmp_path):
    weights = make_model().state_dict()
    weights["head.weight"] = weights["head.weight"] * 1e6
    with pytest.raises(ValueError, match=r"is not finite .*features are torch.float16"):
        attribute(tmp_path, [weights], dtype=torch.float16)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.01), (torch.bfloat16, 0.05), (torch.float64, 1e-4)])
def test_stored_dtypes(tmp_path, checkpoints, expected, dtype, tolerance):
    scores = attribute(tmp_path, checkpoints, dtype=dtype)
    assert float((scores - expected).abs().max() / expected.abs().max()) < tolerance


def test_scoring_an_unfinished_store_is_refused(tmp_path, checkpoints):
    trak = TRAK(make_model(), checkpoints, tmp_path / "store", projection=SparseProjection(32))
    for call in (lambda: trak.score(make_trainer(), TARGETS), trak.scorer):
        with pytest.raises(FileNotFoundError, match="not a feature store yet; call featurize first"):
            call()
    trak.featurize(make_trainer(), DataLoader(TRAIN, batch_size=10), shard_size=10)
    next((tmp_path / "store").rglob("shard-00003.safetensors")).unlink()
    for call in (lambda: trak.score(make_trainer(), TARGETS), trak.scorer):
        with pytest.raises(RuntimeError, match="lacks 1 of 10 shards"):
            call()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"seed": 1}, "made with seed 0, this TRAK has seed 1"),
        ({"projection": SparseProjection(64)}, "made with projection"),
        ({"projection": GaussianProjection(32)}, "made with projection"),
        ({"dtype": torch.float16}, "made with dtype float32"),
        ({"parameters": "head.*"}, "made with 6 parameters, this TRAK has 2 parameters"),
        ({"output": NegativeLoss(lambda module, batch: module(batch[0]).sum(1))}, "made with output"),
    ],
)
def test_a_store_made_otherwise_is_refused(tmp_path, checkpoints, options, match):
    trainer = make_trainer()
    base = {"projection": SparseProjection(32)}
    TRAK(make_model(), checkpoints, tmp_path, **base).featurize(trainer, TRAIN)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    other = TRAK(make_model(), checkpoints, tmp_path, **(base | options))
    with pytest.raises(ValueError, match=match):
        other.featurize(trainer, TRAIN)
    with pytest.raises(ValueError, match=match):
        other.score(trainer, TARGETS)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")} == before


def test_other_checkpoints_and_data_are_refused(tmp_path, checkpoints):
    trainer = make_trainer()
    options = {"projection": SparseProjection(32)}
    TRAK(make_model(), checkpoints, tmp_path, **options).featurize(trainer, TRAIN)
    with pytest.raises(ValueError, match="checkpoints with number 1"):
        TRAK(make_model(), [checkpoints[0], make_model(seed=9).state_dict()], tmp_path, **options).score(
            trainer, TARGETS
        )
    with pytest.raises(ValueError, match="num_examples 50, this TRAK has num_examples 49"):
        TRAK(make_model(), checkpoints, tmp_path, **options).featurize(trainer, Subset(TRAIN, range(49)))


def test_other_data_of_the_same_size_is_refused(tmp_path, checkpoints):
    attribute(tmp_path, checkpoints)
    with pytest.raises(ValueError, match=r"made with data .*, this TRAK has data"):
        attribute(tmp_path, checkpoints, make_data(50, seed=5))


def test_random_augmentation_is_noticed(tmp_path, checkpoints):
    class Augmented(Dataset):
        def __len__(self):
            return 50

        def __getitem__(self, index):
            inputs, label = TRAIN[index]
            return inputs + 0.01 * torch.randn(6), label

    with pytest.warns(UserWarning, match="not the same twice: is there random augmentation"):
        attribute(tmp_path, checkpoints, Augmented())


def test_a_finished_store_is_not_computed_again(tmp_path, checkpoints, monkeypatch):
    trak = TRAK(make_model(), checkpoints, tmp_path, projection=SparseProjection(32))
    trak.featurize(make_trainer(), TRAIN)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("shard*")}
    monkeypatch.setattr("lightning_trak.features.FeatureExtractor.__call__", None)
    trak.featurize(make_trainer(), TRAIN)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("shard*")} == stamps


@pytest.mark.parametrize("largest", [True, False])
def test_top_k(tmp_path, checkpoints, expected, largest):
    top = attribute(tmp_path, checkpoints, score={"top_k": 4, "largest": largest})
    best = expected.topk(4, largest=largest)
    assert torch.equal(top.indices, best.indices)
    torch.testing.assert_close(top.values, best.values)


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
    monkeypatch.setattr("lightning_trak.attribution.TARGET_BYTES", 3 * 32 * 4 * 2)
    scores = attribute(tmp_path, checkpoints, targets=DataLoader(TARGETS, batch_size=3))
    torch.testing.assert_close(scores, expected)
    top = attribute(tmp_path, checkpoints, targets=DataLoader(TARGETS, batch_size=3), score={"top_k": 2})
    assert top.indices.shape == (13, 2)
    assert torch.equal(top.indices, expected.topk(2).indices)


def test_blocks_of_gradients_change_nothing(tmp_path, checkpoints, expected, monkeypatch):
    monkeypatch.setattr("lightning_trak.features.GRADIENT_BYTES", 1000)
    torch.testing.assert_close(attribute(tmp_path, checkpoints), expected)


def test_several_loaders(tmp_path, checkpoints, expected):
    loaders = [DataLoader(TARGETS, batch_size=4), DataLoader(Subset(TARGETS, [3, 1]), batch_size=4)]
    scores = attribute(tmp_path, checkpoints, targets=loaders)
    assert [tuple(part.shape) for part in scores] == [(13, 50), (2, 50)]
    torch.testing.assert_close(scores[0], expected)
    torch.testing.assert_close(scores[1], expected[[3, 1]])


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
    assert (paper.curvature, paper.damping, paper.residuals) == ("identity", 0.0, "averaged")
    assert paper.projection == GaussianProjection(2048)


def test_fewer_examples_than_features_without_damping_is_an_error(tmp_path, checkpoints):
    paper = TRAK.paper(make_model(), checkpoints, tmp_path, projection=GaussianProjection(60))
    paper.featurize(make_trainer(), TRAIN)
    with pytest.raises(ValueError, match=r"Gram matrix of checkpoint 0 \(60 x 60\) is singular.*larger damping"):
        paper.score(make_trainer(), TARGETS)


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


@pytest.mark.parametrize("name", ZOO)
def test_every_architecture_end_to_end(tmp_path, name):
    """Under inference mode, from a real loader, against features computed by hand."""
    module, output, batch, size = specimen(name)
    if output.context_size:
        output = type(output)(context_size=3)
    examples = [copy.copy(part) for part in _unstack(batch, size)]
    loader = DataLoader(_Listed(examples), batch_size=2, collate_fn=lambda items: _stack(items, batch))
    trak = TRAK(
        module, [module.state_dict()], tmp_path, output=output, projection=IdentityProjection(), curvature="identity"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        trak.featurize(make_trainer(), loader)
        scores = trak.score(make_trainer(), loader)
    assert scores.shape == (size, size)
    assert bool(scores.isfinite().all())
    if output.context_size:
        output.set_context(load_file(tmp_path / "checkpoint-0000" / "context.safetensors"))
    _, gradients = LoopEngine(module, output, select_parameters(module))(batch, size)
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
    trak = TRAK(Untraceable(), checkpoints, tmp_path / "auto", projection=SparseProjection(32))
    with pytest.warns(UserWarning, match=r"vmap cannot differentiate Untraceable.*\.item\(\)"):
        trak.featurize(make_trainer(), TRAIN)
    with pytest.warns(UserWarning, match="vmap cannot differentiate"):
        scores = trak.score(make_trainer(), TARGETS)
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    strict = TRAK(Untraceable(), checkpoints, tmp_path / "f", projection=SparseProjection(32), engine="functional")
    with pytest.raises(RuntimeError, match=r"\.item\(\)"):
        strict.featurize(make_trainer(), TRAIN)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(TRAIN)


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        (DataLoader(Stream()), TypeError, "cannot attribute to a Stream.*map-style"),
        (Stream(), TypeError, "cannot attribute to a Stream"),
        ([1, 2], TypeError, "cannot attribute to a int"),
        (DataLoader(TRAIN, sampler=SubsetRandomSampler([1, 2])), ValueError, r"draws a subset.*Subset\(dataset"),
        (DataLoader(TRAIN, batch_size=None), ValueError, "automatic batching off"),
        (DataLoader(Subset(TRAIN, []), batch_size=2), ValueError, "dataset is empty"),
        ([DataLoader(TRAIN), DataLoader(TRAIN)], ValueError, "one training set, got 2 loaders"),
    ],
)
def test_data_that_cannot_be_attributed_to(tmp_path, checkpoints, data, error, match):
    with pytest.raises(error, match=match):
        attribute(tmp_path, checkpoints, train=data)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"curvature": "fisher"}, ValueError, "curvature must be one of 'gauss_newton', 'identity'; got 'fisher'"),
        ({"residuals": "none"}, ValueError, "residuals must be one of"),
        ({"engine": "fast"}, ValueError, "engine must be one of"),
        ({"dtype": torch.int8}, ValueError, "dtype must be one of"),
        ({"damping": -1.0}, ValueError, "damping must be at least 0"),
        ({"soft_threshold": -1.0}, ValueError, "soft_threshold must be at least 0"),
        ({"output": "margin"}, TypeError, "must be a ModelOutput, got str"),
    ],
)
def test_bad_options(tmp_path, checkpoints, options, error, match):
    with pytest.raises(error, match=match):
        TRAK(make_model(), checkpoints, tmp_path, **options)


def test_a_model_without_an_output_is_refused(tmp_path, checkpoints):
    with pytest.raises(TypeError, match="Linear declares no model output: derive it from AttributionMixin"):
        TRAK(nn.Linear(2, 2), checkpoints, tmp_path)


def test_weights_of_another_model_are_refused(tmp_path):
    other = nn.Linear(6, 3).state_dict()
    with pytest.raises(ValueError, match=r"does not fit LitNet: .*\n.*Missing key"):
        attribute(tmp_path, [other])


@pytest.mark.parametrize("option", [{"limit_predict_batches": 1}, {"fast_dev_run": True}])
def test_a_trainer_that_would_skip_examples_is_refused(tmp_path, checkpoints, option):
    with pytest.raises(ValueError, match=r"limit_predict_batches=1.*use a Trainer without it"):
        attribute(tmp_path, checkpoints, trainer=make_trainer(**option))


def test_top_k_must_be_positive(tmp_path, checkpoints):
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        attribute(tmp_path, checkpoints, score={"top_k": 0})


def test_mixed_precision_of_the_trainer_is_left_out(tmp_path, checkpoints, expected):
    scores = attribute(tmp_path, checkpoints, trainer=make_trainer(precision="bf16-mixed"))
    assert torch.equal(scores, expected)


def test_true_half_precision_of_the_trainer_is_used(tmp_path, checkpoints, expected):
    trainer = make_trainer(precision="bf16-true")
    scores = attribute(tmp_path, checkpoints, trainer=trainer, engine="functional")
    assert not torch.equal(scores, expected)
    assert float((scores - expected).norm() / expected.norm()) < 0.1


def test_transfer_hooks_of_the_user_are_called(tmp_path, checkpoints, expected):
    class Scaling(LitNet):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return (batch[0] / 10, batch[1])

    times_ten = TensorDataset(TRAIN.tensors[0] * 10, TRAIN.tensors[1])
    targets = TensorDataset(TARGETS.tensors[0] * 10, TARGETS.tensors[1])
    trak = TRAK(Scaling(), checkpoints, tmp_path, projection=SparseProjection(32))
    trak.featurize(make_trainer(), times_ten)
    torch.testing.assert_close(trak.score(make_trainer(), targets), expected, rtol=1e-3, atol=1e-6)
    parts = make_trainer().predict(trak.scorer(), DataLoader(targets, batch_size=13))
    torch.testing.assert_close(parts[0], expected, rtol=1e-3, atol=1e-6)
