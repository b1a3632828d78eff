"""What users ask of scores: another output, groups of either side, chosen examples, and both ends."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import TRAK, GradientCosine, GradientDot, TracIn
from lightning_trak.methods import EKFACInfluence, ExactKernel, Explicit, InfluenceFunction
from lightning_trak.outputs import ClassificationMargin, ContrastiveMargin, DirectionOutput
from lightning_trak.projections import SparseProjection
from lightning_trak.scoring import Groups, aggregate_scores, targets
from tests.lit import TARGETS, TRAIN, make_checkpoints, make_model, make_trainer

INPUTS, LABELS = TARGETS.tensors
CLASSES = ["red", "green", "blue"]
SOURCES = ["web" if position % 3 else "books" for position in range(50)]
WEIGHTED = Groups([None, *SOURCES[1:]], weights=torch.linspace(-1, 2, 50))
METHODS = {
    "TRAK": (TRAK, {}),
    "dual": (TRAK, {"projection": SparseProjection(60)}),
    "averaged": (TRAK, {"loss_gradients": "averaged"}),
    "sparse": (TRAK, {"soft_threshold": 0.05}),
    "dot": (GradientDot, {}),
    "cosine": (GradientCosine, {}),
    "TracIn": (TracIn, {"learning_rates": [0.3, 0.1]}),
    "exact": (ExactKernel, {"dtype": torch.float32}),
}


def make(path, name="TRAK", count=2, **more):
    kind, options = METHODS[name]
    options = ({} if kind is ExactKernel else {"projection": SparseProjection(24)}) | options | more
    method = kind(make_model(), make_checkpoints(count), path / name, **options)
    method.featurize(make_trainer(), DataLoader(TRAIN, batch_size=8), shard_size=16)
    return method


def close(found, expected):
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make(tmp_path_factory.mktemp("refused"), count=1).store


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_groups_are_sums_of_the_matrix(tmp_path, monkeypatch, name):
    method, trainer, data = make(tmp_path, name), make_trainer(), DataLoader(TARGETS, batch_size=7)
    full = method.score(trainer, data)
    monkeypatch.setattr(targets, "TARGET_BYTES", 1)  # a block for each batch
    close(method.score(trainer, data, aggregate="mean"), full.mean(0, keepdim=True))
    by_class = torch.stack([full[label == LABELS].sum(0) for label in range(3)])
    weights = torch.rand(13, generator=torch.Generator().manual_seed(0))
    weighted = (full * weights.unsqueeze(1)).sum(0, keepdim=True) / weights.sum()
    close(method.score(trainer, data, aggregate="mean", groups=Groups([7] * 13, weights)), weighted)
    books = torch.tensor([source == "books" for source in SOURCES])
    shares = torch.stack([full[:, books].sum(1), full[:, ~books].sum(1)], dim=1)
    close(method.score(trainer, data, train_groups=SOURCES), shares)
    both = method.score(trainer, data, aggregate="sum", groups=LABELS, train_groups=WEIGHTED)
    close(both, aggregate_scores(full, "sum", LABELS, WEIGHTED))
    top = method.score(trainer, data, top_k=4, aggregate="sum", groups=LABELS)
    close(top.values, by_class.topk(4).values)
    best = method.score(trainer, data, top_k=1, train_groups=SOURCES)
    close(best.values, shares.topk(1).values)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TRAK", "dual", "exact"])
def test_chosen_training_examples_and_both_ends(tmp_path, name):
    method, trainer = make(tmp_path, name), make_trainer()
    full, chosen = method.score(trainer, TARGETS), torch.tensor([49, 3, 17, 20])
    close(method.score(trainer, TARGETS, train=chosen), full[:, chosen])
    found = method.score(trainer, TARGETS, train=[49, 3, 17, 20], top_k=2, largest=False)
    assert torch.equal(found.indices, chosen[full[:, chosen].topk(2, largest=False).indices])
    close(method.score(trainer, TARGETS, train=range(5), aggregate="mean"), full[:, :5].mean(0, keepdim=True))
    ends = method.score(trainer, TARGETS, top_k=3)
    assert ends.values is ends.proponents.values
    assert ends.indices is ends.proponents.indices
    for end, largest in ((ends.proponents, True), (ends.opponents, False)):
        one = method.score(trainer, TARGETS, top_k=3, largest=largest)
        assert torch.equal(end.indices, one.indices)
        assert torch.equal(end.values, one.values)
    batches = trainer.predict(method.scorer(top_k=3), DataLoader(TARGETS, batch_size=13))
    close(batches[0].opponents.values, ends.opponents.values)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TRAK", "dot", "exact"])
def test_another_output_is_that_of_other_labels(tmp_path, name):
    method, trainer = make(tmp_path, name, count=1), make_trainer()
    model = make_model()
    model.load_state_dict(make_checkpoints(1)[0])
    predicted = model.eval()(INPUTS).argmax(1)
    wrong = TensorDataset(INPUTS, (predicted + 1) % 3)
    images = TensorDataset(INPUTS)
    expected = method.score(trainer, TensorDataset(INPUTS, predicted))
    for data in (images, wrong):
        close(method.score(trainer, data, output=ClassificationMargin(labels="predicted")), expected)
    fixed = method.score(trainer, TensorDataset(INPUTS, torch.full((13,), 2)))
    close(method.score(trainer, images, output=ClassificationMargin(labels="blue", classes=CLASSES)), fixed)
    close(method.score(trainer, TARGETS), make(tmp_path, name, count=1).score(trainer, TARGETS))


def test_why_three_rather_than_eight(tmp_path):
    """The difference of two logits has the difference of their gradients."""
    method, trainer = make(tmp_path, count=2), make_trainer()
    images = TensorDataset(INPUTS)

    def ask(labels, against):
        return method.score(trainer, images, output=ClassificationMargin(labels=labels, against=against))

    close(ask(0, 1), -ask(1, 0))
    close(ask(0, 1) + ask(1, 2), ask(0, 2))


def test_a_direction_in_a_layer(tmp_path):
    """That of two logits, which the model scales by 1.5, is their difference."""
    method, trainer = make(tmp_path, count=2), make_trainer()
    direction = DirectionOutput("head", torch.tensor([1.5, -1.5, 0]), forward=lambda module, batch: module(batch[0]))
    expected = method.score(trainer, TensorDataset(INPUTS), output=ClassificationMargin(labels=0, against=1))
    for data in (TensorDataset(INPUTS), DataLoader(TARGETS, batch_size=3)):
        close(method.score(trainer, data, output=direction), expected)
    found = method.score(trainer, TARGETS, output=direction, aggregate="mean", top_k=2)
    close(found.opponents.values, expected.mean(0, keepdim=True).topk(2, largest=False).values)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [InfluenceFunction, EKFACInfluence])
def test_influence_of_another_output(kind):
    options = {"solver": Explicit(), "damping": 0.1} if kind is InfluenceFunction else {}
    method = kind(make_model(), make_checkpoints(1), **options)
    model = make_model()
    model.load_state_dict(make_checkpoints(1)[0])
    predicted = model.eval()(INPUTS).argmax(1)
    expected = method.attribute(make_trainer(), TRAIN, TensorDataset(INPUTS, predicted))
    asked = ClassificationMargin(labels="predicted")
    found = method.attribute(make_trainer(), TRAIN, TensorDataset(INPUTS), output=asked)
    close(found, expected)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"aggregate": "median"}, "aggregate must be one of 'mean', 'sum'"),
        ({"groups": LABELS}, 'groups needs aggregate="mean"'),
        ({"aggregate": "mean", "groups": LABELS[:5]}, "groups has 5 labels, and there are 13 targets"),
        ({"train_groups": SOURCES[:7]}, "train_groups has 7 labels, and there are 50 training examples"),
        ({"train_groups": torch.zeros(50)}, "expected labels of groups as integers"),
        ({"train_groups": SOURCES, "train": [1]}, "give train or train_groups, not both"),
        ({"train": [50]}, "train names training example 50, and there are 50"),
        ({"train": [-1]}, "train names training example -1"),
        ({"train": [3, 4, 3]}, "train names training example 3 twice"),
        ({"train": []}, "train names no training example"),
        ({"train": torch.ones(50, dtype=torch.bool)}, "not a mask"),
        ({"train": torch.zeros(2, 1, dtype=torch.int64)}, "in one dimension"),
        ({"train": "web"}, '"web" is a text, not data'),
        ({"train": [DataLoader(TRAIN), DataLoader(TRAIN)]}, "expected one training set, got 2 loaders"),
        ({"train": TRAIN, "train_groups": SOURCES[:7]}, "train_groups has 7 labels, and there are 50"),
        ({"train_group": SOURCES}, "unexpected keyword argument 'train_group': did you mean 'train_groups'"),
        ({"candidates": TRAIN}, "score got an unexpected keyword argument 'candidates': there are aggregate, data, "),
        ({"topk": 3}, "unexpected keyword argument 'topk': did you mean 'top_k'"),
        ({"train": torch.ones(3, 6)}, r"for examples give a Dataset or DataLoader, such as TensorDataset"),
        ({"top_k": ClassificationMargin()}, "top_k is a number of training examples, got a ClassificationMargin"),
        ({"top_k": 2, "largest": "both"}, "largest is True, False or None for both ends, got 'both'"),
        ({"top_k": 2, "largest": 0}, "largest is True, False or None for both ends, got 0"),
        ({"largest": True}, "largest=True says which end of the scores top_k= keeps: say how many"),
        ({"output": ContrastiveMargin(context_size=3)}, "make a store whose training examples have this output"),
        ({"output": "predicted"}, "output must be a ModelOutput"),
        ({"output": ClassificationMargin(labels=3)}, "labels is class 3, but the model has 3 classes, 0 to 2"),
        ({"output": ClassificationMargin(labels="a", classes=["a", "b"])}, "names 2 classes, but the model has 3"),
        ({"output": ClassificationMargin(labels=None, against=1)}, "which is compared with itself"),
        ({"top_k": 2, "rescore": 5, "train_groups": SOURCES, "train": TRAIN}, r"use attribute\(..., train_groups=\)"),
    ],
)
def test_what_does_not_fit_is_refused(store, options, error):
    method = TRAK(make_model(), make_checkpoints(1), store, projection=SparseProjection(24))
    with pytest.raises((ValueError, TypeError), match=error):
        method.score(make_trainer(), TARGETS, **options)


def test_an_output_of_targets_alone_has_no_store(tmp_path):
    with pytest.raises(TypeError, match="output of targets alone"):
        TRAK(make_model(), make_checkpoints(1), tmp_path, output=ClassificationMargin(labels="predicted"))
