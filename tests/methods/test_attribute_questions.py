"""What `attribute` answers, of the methods without stored features: sums, both ends, intervals, candidates."""

import pytest
import torch
from torch.utils.data import DataLoader, Subset

from lightning_trak import GradientDot, Metagradient
from lightning_trak.methods import (
    BM25,
    DataShapley,
    EKFACInfluence,
    EmpiricalInfluence,
    Explicit,
    InfluenceFunction,
    KNNShapley,
    RandomScores,
    RepresentationSimilarity,
)
from lightning_trak.methods.influence import base
from lightning_trak.metrics.functional import bootstrap_interval
from lightning_trak.outputs import ClassificationMargin
from lightning_trak.projections import IdentityProjection
from lightning_trak.scoring import Groups, aggregate_scores
from tests.lit import TARGETS, TRAIN, LitNet, make_checkpoints, make_data, make_model, make_trainer
from tests.methods import metagradients
from tests.methods.test_questions import LABELS, SOURCES, WEIGHTED, close
from tests.replay import runs

CHOSEN = Groups([*([0] * 6), None, *([1] * 6)], torch.arange(13) - 2.0)


def make_influence(kind, count=2):
    options = {"solver": Explicit(), "damping": 0.1} if kind is InfluenceFunction else {}
    return kind(make_model(), make_checkpoints(count), **options)


def require_sums(attribute, full, targets, train, weighted):
    """All that is asked is what the matrix gives by hand."""
    close(attribute(aggregate="mean"), full.mean(0, keepdim=True))
    both = attribute(aggregate="sum", groups=weighted, train_groups=train)
    close(both, aggregate_scores(full, "sum", weighted, train))
    top = attribute(top_k=2)
    for end, largest in zip(top, (True, False), strict=True):
        close(end.values, full.topk(2, largest=largest).values)
        close(full.gather(1, end.indices), end.values)
    found, low, high = attribute(aggregate="mean", groups=targets, top_k=2, largest=True, interval=0.9)
    means = aggregate_scores(full, "mean", targets).float()
    close(found.values, means.topk(2).values)
    for group, name in enumerate(Groups(targets).names):
        ends = bootstrap_interval(full[targets == name].T, 0.9).gather(1, found.indices[group].expand(2, -1))
        close(torch.stack([low.values[group], high.values[group]]), ends)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [InfluenceFunction, EKFACInfluence])
def test_influence_functions(monkeypatch, kind):
    method = make_influence(kind, 1)

    def attribute(**question):
        return method.attribute(make_trainer(), TRAIN, DataLoader(TARGETS, batch_size=4), **question)

    full = attribute()
    require_sums(attribute, full, LABELS, WEIGHTED, CHOSEN)
    monkeypatch.setattr(base, "TARGET_BYTES", 1)  # a group at a time
    close(attribute(aggregate="sum", groups=LABELS), aggregate_scores(full, "sum", LABELS))
    mixed = torch.utils.data.ConcatDataset([make_data(3, seed=5), Subset(TRAIN, [49, 3])])
    others = attribute(candidates=DataLoader(mixed, batch_size=2), train_groups=[0, 0, 0, 2, 1])
    close(others[:, 1:], full[:, [3, 49]])


@pytest.mark.slow
def test_candidates_of_influence_functions_are_those_of_a_store(tmp_path):
    """At a damping so large that the curvature does not count, influence is a product of gradients."""
    new, trainer = make_data(4, seed=5), make_trainer(precision="64-true")
    influence = InfluenceFunction(make_model(), make_checkpoints(1), solver=Explicit(), damping=1e9)
    dot = GradientDot(
        make_model(),
        make_checkpoints(1),
        tmp_path,
        effect_on="output",
        projection=IdentityProjection(),
        dtype=torch.float64,
    )
    expected = dot.attribute(trainer, TRAIN, TARGETS, candidates=new)
    found = influence.attribute(trainer, TRAIN, TARGETS, candidates=new)
    torch.testing.assert_close(found / found.norm(), expected / expected.norm(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_metagradients(tmp_path, monkeypatch):
    module, targets = runs.Net(), runs.make_data(5, seed=5)
    trainer = runs.train(module, metagradients.DATA, tmp_path)
    method = Metagradient(module, tmp_path, progress_bar=False, check_smooth=False)

    def attribute(**question):
        return method.attribute(trainer, metagradients.DATA, targets, **question)

    groups, full = torch.tensor([0, 1, 0, 1, 0]), attribute()
    sources = Groups([None, *(number % 3 for number in range(1, full.shape[1]))])
    require_sums(attribute, full, groups, sources, Groups(groups, torch.linspace(-1, 1, 5)))
    monkeypatch.setattr("lightning_trak.replay.reverse.run.COTANGENT_BYTES", 1)  # a group at a time
    close(attribute(aggregate="sum", groups=groups), aggregate_scores(full, "sum", groups))
    with pytest.raises(ValueError, match="Metagradient takes no candidates=: it differentiates by the weights"):
        attribute(candidates=metagradients.DATA)


@pytest.mark.slow
def test_baselines():
    method = RepresentationSimilarity(make_model(), make_checkpoints(1))

    def attribute(**question):
        return method.attribute(make_trainer(), TRAIN, TARGETS, **question)

    require_sums(attribute, attribute(), LABELS, WEIGHTED, CHOSEN)


MASKS = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 1]]).bool()
OTHERS = [
    RandomScores(),
    BM25("text"),
    RepresentationSimilarity(make_model(), make_checkpoints(1)),
    KNNShapley(make_model(), make_checkpoints(1)),
    EmpiricalInfluence(MASKS, torch.ones(2, 3)),
    DataShapley(LitNet, make_trainer),
]


@pytest.mark.parametrize("method", OTHERS, ids=lambda method: type(method).__name__)
def test_what_a_method_cannot_answer(method):
    name, trainer = type(method).__name__, make_trainer()
    instead = {"EmpiricalInfluence": "outputs= holds", "DataShapley": "utility= says"}.get(name, "TRAK, TracIn")
    with pytest.raises(ValueError, match=f"{name} takes no output=: .*{instead}"):
        method.attribute(trainer, TRAIN, TARGETS, output=ClassificationMargin(labels=1))
    with pytest.raises(ValueError, match=f"{name} takes no candidates=: .*influence functions score"):
        method.attribute(trainer, TRAIN, TARGETS, candidates=TARGETS)


@pytest.mark.parametrize(
    ("question", "error"),
    [
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"aggregated": "mean"}, "unexpected keyword argument 'aggregated': did you mean 'aggregate'"),
        ({"candidates": [1, 2]}, r"for some training examples use torch.utils.data.Subset\(train, positions\)"),
        ({"largest": False}, "say how many with top_k="),
        ({"groups": LABELS}, 'groups needs aggregate="mean"'),
        ({"train_groups": SOURCES[1:]}, "train_groups has 49 labels, and there are 50"),
        ({"interval": 0.9}, "give aggregate="),
        ({"interval": 95, "aggregate": "mean"}, "between 0 and 0.999"),
        ({"interval": 0.9, "aggregate": "mean", "groups": [*"a" * 12, "b"]}, "group number 1 has 1"),
    ],
)
def test_questions_that_do_not_fit_are_refused_before_the_work(tmp_path, question, error):
    store = GradientDot(make_model(), make_checkpoints(1), tmp_path / "store")
    for method in (make_influence(EKFACInfluence, 1), store):
        with pytest.raises((ValueError, TypeError), match=error):
            method.attribute(make_trainer(), TRAIN, TARGETS, **question)
    assert not store.store.exists()
