"""Training examples whose features are not finite: all are named, or they are left out."""

import os
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lightning_trak import TRAK
from lightning_trak.cleaning import duplicates
from lightning_trak.features.finiteness import NotFiniteError
from lightning_trak.features.store import FeatureStore
from lightning_trak.methods import ExactKernel, GradientCosine
from lightning_trak.outputs import ClassificationMargin
from lightning_trak.projections import KroneckerProjection, PrincipalProjection, SparseProjection
from tests.features.small_net import draw, make_net
from tests.lit import TARGETS, make_trainer

BAD = [0, 7, 8, 22, 29]
GOOD = [position for position in range(30) if position not in BAD]


INPUTS, LABELS = draw(30, 6), draw(30, 3, seed=1).argmax(1)
INPUTS[BAD, [0, 1, 2, 3, 4]] = torch.tensor([torch.nan, torch.inf, torch.nan, -torch.inf, torch.nan])
DATA = TensorDataset(INPUTS, LABELS)


WEIGHTS = [make_net(seed).state_dict() for seed in range(2)]


def make(directory, method=TRAK, **options):
    settings = {"output": ClassificationMargin()} | (
        {"projection": SparseProjection(16)} if method is not ExactKernel else {}
    )
    return method(make_net(), WEIGHTS, directory, **(settings | options))


def featurize(trak, data=DATA, **options):
    trak.featurize(make_trainer(), DataLoader(data, batch_size=4), shard_size=8, **options)


def test_all_are_named_and_all_other_shards_are_kept(tmp_path):
    trak = make(tmp_path)
    with pytest.raises(
        NotFiniteError,
        match=r"features of 4 examples \(0, 7, 8, 22\) at checkpoint 0 .*; the features .* at checkpoint 1 .*on_nan",
    ) as caught:
        featurize(trak, Subset(DATA, range(29)))
    assert caught.value.positions == [0, 7, 8, 22]
    assert sorted(path.name for path in tmp_path.rglob("shard-*")) == ["shard-00003.safetensors"] * 2
    featurize(trak, Subset(DATA, range(29)), on_nan="skip")
    with pytest.raises(
        NotFiniteError, match='an earlier run with on_nan="skip" has left out the features of 4'
    ) as caught:
        featurize(trak, Subset(DATA, range(29)), on_nan="raise")
    assert caught.value.positions == [0, 7, 8, 22]


def test_many_are_counted(tmp_path):
    inputs = INPUTS.clone()
    inputs[:, 0] = torch.nan
    inputs[::8] = 0
    with pytest.raises(NotFiniteError, match=r"26 examples \(1, 2, .*, 22 and 6 more\)") as caught:
        featurize(make(tmp_path), TensorDataset(inputs, LABELS))
    assert len(caught.value.positions) == 26


def test_a_run_in_which_nothing_is_finite_ends_early(tmp_path):
    with pytest.raises(NotFiniteError, match=r"the features of \d+ examples .* and \d+ more") as caught:
        featurize(make(tmp_path), TensorDataset(torch.full((400, 6), torch.nan), torch.zeros(400, dtype=torch.long)))
    assert 100 <= len(caught.value.positions) < 150


@pytest.mark.filterwarnings("ignore:TRAK")
@pytest.mark.parametrize(
    ("method", "options"),
    [
        (TRAK, {}),
        (TRAK, {"dtype": "int8", "engine": "functional"}),
        (TRAK, {"engine": "loop", "projection": SparseProjection(8), "damping": 0.1}),
        (ExactKernel, {}),
        (GradientCosine, {}),
    ],
)
def test_scores_are_those_without_them(tmp_path, method, options):
    trak, alone = make(tmp_path / "skipped", method, **options), make(tmp_path / "alone", method, **options)
    featurize(trak, on_nan="skip")
    assert trak.skipped == BAD
    assert make(tmp_path / "skipped", method, **options).skipped == BAD
    featurize(alone, Subset(DATA, GOOD))
    scores, expected = (each.score(make_trainer(), TARGETS) for each in (trak, alone))
    assert not scores[:, BAD].any()
    torch.testing.assert_close(scores[:, GOOD], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    own = trak.self_influence(make_trainer()) if method is not GradientCosine else torch.zeros(30)
    assert not own[BAD].any()
    for largest in (True, False):
        top = trak.score(make_trainer(), TARGETS, top_k=28, largest=largest)
        assert top.indices.sort().values.tolist() == [GOOD] * len(TARGETS)
        torch.testing.assert_close(top.values, scores.gather(1, top.indices))
    ends = trak.score(make_trainer(), TARGETS, top_k=3, largest=None)
    assert not set(torch.cat([ends.proponents.indices, ends.opponents.indices]).flatten().tolist()) & set(BAD)
    chosen = trak.score(make_trainer(), TARGETS, top_k=3, largest=True, train=[7, 1, 22])
    assert set(chosen.indices.flatten().tolist()) == {1}
    groups = ["bad" if position in BAD else "good" for position in range(30)]
    shares = trak.score(make_trainer(), TARGETS, train_groups=groups)
    torch.testing.assert_close(shares, torch.stack([torch.zeros(len(TARGETS)), scores.sum(1)], 1), rtol=1e-4, atol=1e-5)
    assert trak.score(make_trainer(), TARGETS, top_k=2, largest=True, train_groups=groups).indices.tolist() == [
        [1]
    ] * len(TARGETS)


@pytest.mark.filterwarnings("ignore:TRAK")
@pytest.mark.parametrize(
    "projection",
    [PrincipalProjection(4, landmarks=8, sample=30, sketch=16), KroneckerProjection(2, 2, axes="principal", sample=30)],
)
def test_projections_are_fitted_to_the_rest(tmp_path, projection):
    trak = make(tmp_path, projection=projection, damping=0.1)
    with pytest.raises(NotFiniteError):
        featurize(trak)
    featurize(trak, on_nan="skip")
    assert trak.skipped == BAD
    assert bool(trak.score(make_trainer(), TARGETS).isfinite().all())


class Guarded(nn.Module):
    """At the second checkpoint, the gradient of an example with a large first input is not finite."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, inputs):
        return self.head(inputs) + 0 * (1e6 * self.head.bias[0] * (inputs[:, :1] - 1).relu()).exp()


@pytest.mark.filterwarnings("ignore:TRAK")
def test_an_example_that_one_checkpoint_cannot_differentiate_is_left_out_at_all(tmp_path):
    weights = [make_weights(bias) for bias in (-1.0, 1.0)]
    inputs = draw(30, 6, seed=4)
    large = (inputs[:, 0] > 1).nonzero().flatten().tolist()
    trak = TRAK(Guarded(), weights, tmp_path, output=ClassificationMargin(), projection=SparseProjection(16))
    with pytest.raises(NotFiniteError) as caught:
        featurize(trak, TensorDataset(inputs, LABELS))
    assert caught.value.positions == large
    assert "checkpoint 0" not in str(caught.value)
    featurize(trak, TensorDataset(inputs, LABELS), on_nan="skip")
    assert trak.skipped == large
    assert not trak.score(make_trainer(), TensorDataset(-inputs.abs(), LABELS))[:, large].any()
    alone = TRAK(Guarded(), weights[:1], tmp_path, output=ClassificationMargin(), projection=SparseProjection(16))
    assert alone.skipped == []


def make_weights(bias):
    return {"head.weight": draw(3, 6, seed=9), "head.bias": torch.full((3,), bias)}


@pytest.mark.filterwarnings("ignore:TRAK")
def test_skipped_examples_survive_stops_growth_and_more_checkpoints(tmp_path, monkeypatch):
    write, count = FeatureStore.save, []

    def stopped(self, *args):
        count.append(args)
        if len(count) == 3:
            raise KeyboardInterrupt
        write(self, *args)

    first = TRAK(make_net(), WEIGHTS[:1], tmp_path, output=ClassificationMargin(), projection=SparseProjection(16))
    with monkeypatch.context() as patched:
        patched.setattr(FeatureStore, "save", stopped)
        with pytest.raises(KeyboardInterrupt):
            featurize(first, Subset(DATA, range(25)), on_nan="skip")
    featurize(first, Subset(DATA, range(25)), on_nan="skip")
    assert first.skipped == [0, 7, 8, 22]
    trak = make(tmp_path)
    featurize(trak, on_nan="skip")
    alone = make(tmp_path / "alone")
    featurize(alone, on_nan="skip")
    assert trak.skipped == alone.skipped == BAD
    torch.testing.assert_close(trak.score(make_trainer(), TARGETS), alone.score(make_trainer(), TARGETS))


def test_a_model_whose_weights_are_not_finite_has_nothing_to_score(tmp_path):
    weights = {name: torch.full_like(tensor, torch.nan) for name, tensor in WEIGHTS[0].items()}
    trak = TRAK(make_net(), [weights], tmp_path, output=ClassificationMargin(), projection=SparseProjection(16))
    with pytest.raises(NotFiniteError, match="no training example has finite features"):
        featurize(trak, on_nan="skip")


def test_rescoring_needs_all_examples(tmp_path):
    trak = make(tmp_path)
    with pytest.warns(UserWarning, match="their scores are 0 and they are never among the top_k"):
        featurize(trak, on_nan="skip")
    with pytest.raises(ValueError, match="has left out 5 examples whose gradients are not finite"):
        trak.score(make_trainer(), TARGETS, top_k=2, largest=True, rescore=4)
    with pytest.raises(ValueError, match="on_nan"):
        featurize(trak, on_nan="ignore")


@pytest.mark.filterwarnings("ignore:TRAK")
def test_calls_that_featurize_go_on_without_what_was_left_out(tmp_path):
    trak, train = make(tmp_path), DataLoader(DATA, batch_size=4)
    with pytest.raises(NotFiniteError, match=r"leave these examples out with featurize\(on_nan=\"skip\"\)"):
        trak.attribute(make_trainer(), train, TARGETS)
    featurize(trak, on_nan="skip")
    torch.testing.assert_close(trak.attribute(make_trainer(), train, TARGETS), trak.score(make_trainer(), TARGETS))
    suspicion = trak.label_suspicion(make_trainer(), train)
    assert suspicion[BAD].eq(suspicion.min()).all()
    assert not set(duplicates(trak, make_trainer(), train).positions.tolist()) & set(BAD)


@pytest.mark.filterwarnings("ignore:TRAK")
def test_examples_left_out_are_neither_suspicious_nor_neighbours(tmp_path):
    few, good = Subset(DATA, range(10)), [1, 2, 3, 4, 5, 6, 9]
    cosine, alone = make(tmp_path / "cosine", GradientCosine), make(tmp_path / "alone", GradientCosine)
    featurize(cosine, few, on_nan="skip")
    suspicion = cosine.label_suspicion(make_trainer(), few)
    expected = alone.label_suspicion(make_trainer(), Subset(DATA, good))
    torch.testing.assert_close(suspicion[good], expected)
    assert suspicion[[0, 7, 8]].eq(expected.min()).all()


class ProcessOfItem(Dataset):
    """Each item is the process that loads it."""

    def __len__(self):
        return 3

    def __getitem__(self, position):
        return os.getpid()


def test_a_worker_loads_the_example_whose_reason_is_asked_for():
    """A dataset that opens files at first use must not open them in this process, before workers are forked."""
    output = SimpleNamespace(explain_nan=lambda module, batch: f"loaded by {batch.item()}")
    model = SimpleNamespace(module=nn.Linear(1, 1), output=output, differentiable=nullcontext)
    error = NotFiniteError("not finite", [2]).explained(model, DataLoader(ProcessOfItem(), num_workers=1))
    assert "Example 2: loaded by " in str(error)
    assert not str(error).endswith(f" {os.getpid()}")
