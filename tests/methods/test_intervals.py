"""Intervals by bootstrap over targets, of means and sums that are kept without the matrix."""

import logging

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import TRAK
from lightning_trak.metrics.functional import bootstrap_interval
from lightning_trak.outputs import ClassificationMargin
from lightning_trak.projections import SparseProjection
from lightning_trak.scoring import Groups
from lightning_trak.scoring.groups import Sums
from lightning_trak.scoring.intervals import bounds
from tests.lit import TARGETS, TRAIN, make_checkpoints, make_model, make_trainer
from tests.methods.test_candidates import Candidates
from tests.methods.test_questions import LABELS, SOURCES, close, make

WEIGHTS = torch.arange(13) / 4  # the first target does not count


def by_hand(values, weights, mean, draws=2000):
    """Draw targets again and again."""
    drawn = torch.randint(len(weights), (draws, len(weights)), generator=torch.Generator().manual_seed(0))
    means = []
    for row in drawn:
        total = (values[row] * weights[row].unsqueeze(1)).sum(0)
        means.append(total / weights[row].sum() if mean else total)
    return torch.stack(means).quantile(torch.tensor([0.05, 0.95], dtype=torch.float64), dim=0)


@pytest.mark.parametrize("mean", [True, False])
def test_weighted_targets_by_hand(mean):
    scores = torch.randn(13, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = WEIGHTS.double() if mean else WEIGHTS.double() - 1
    found = bounds(scores, Sums(torch.zeros(13, dtype=torch.int64), weights, 1), mean, 0.9)
    counts = weights != 0
    expected = by_hand(scores[counts], weights[counts], mean)
    torch.testing.assert_close(torch.stack(found)[:, 0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TRAK", "exact"])
def test_they_are_those_of_the_matrix(tmp_path, name):
    method, trainer, data = make(tmp_path, name), make_trainer(), DataLoader(TARGETS, batch_size=4)
    full, asked = method.score(trainer, data), {"aggregate": "mean", "groups": LABELS}
    ends = torch.stack([bootstrap_interval(full[label == LABELS].T, 0.9) for label in range(3)], dim=1)
    found, low, high = method.score(trainer, data, top_k=3, interval=0.9, **asked)
    plain = method.score(trainer, data, top_k=3, **asked)
    for number in range(2):
        assert torch.equal(found[number].values, plain[number].values)
        indices = plain[number].indices
        assert torch.equal(low[number].indices, indices)
        close(low[number].values, ends[0].gather(1, indices))
        close(high[number].values, ends[1].gather(1, indices))
    some = method.score(trainer, data, train=[49, 3], interval=0.9, **asked)
    close(some.low, ends[0][:, [49, 3]])
    one = method.score(trainer, data, train=[49, 3, 4], top_k=1, largest=False, interval=0.9, **asked)
    close(one.high.values, ends[1].gather(1, one.scores.indices))
    books = torch.tensor([source == "books" for source in SOURCES])
    shares = torch.stack([full[:, books].sum(1), full[:, ~books].sum(1)])
    means = method.score(trainer, data, train_groups=SOURCES, aggregate="mean", interval=0.9)
    close(torch.cat([means.low, means.high]), bootstrap_interval(shares, 0.9))


@pytest.mark.slow
def test_of_candidates_and_another_output(tmp_path):
    method, trainer = make(tmp_path, count=2), make_trainer()
    images, asked = TensorDataset(TARGETS.tensors[0]), {"output": ClassificationMargin(labels="predicted")}
    full = method.score(trainer, images, train=Candidates(), **asked)
    found = method.score(
        trainer, images, train=Candidates(), top_k=2, largest=True, aggregate="sum", interval=0.9, **asked
    )
    indices = full.sum(0).topk(2).indices
    assert found.scores.indices.tolist() == [indices.tolist()]
    expected = bootstrap_interval(full.T[indices], 0.9) * 13
    close(torch.cat([found.low.values, found.high.values]), expected)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make(tmp_path_factory.mktemp("refused"), count=1).store


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"aggregate": "mean"}, r"keep the best columns with top_k=, name some by train=\[...\], or add them up"),
        ({"aggregate": "mean", "train": TRAIN}, "keep the best columns with top_k="),
        ({"aggregate": "mean", "top_k": 2, "rescore": 5}, "leave rescore out"),
        ({"top_k": 2}, 'give aggregate="mean"'),
        (
            {"top_k": 2, "aggregate": "mean", "interval": 95},
            "between 0 and 0.999, such as 0.95, got 95",
        ),
        ({"top_k": 2, "aggregate": "mean", "interval": 0.9999}, "between 0 and 0.999"),
        ({"top_k": 2, "aggregate": "mean", "groups": [*"a" * 12, "b"]}, "group number 1 has 1"),
        ({"top_k": 2, "aggregate": "mean", "groups": Groups([0] * 13, [1, *[0] * 12])}, "group number 0 has 1"),
    ],
)
def test_what_does_not_fit_is_refused(store, options, error):
    method = TRAK(make_model(), make_checkpoints(1), store, projection=SparseProjection(24))
    with pytest.raises(ValueError, match=error):
        method.score(make_trainer(), TARGETS, **({"interval": 0.9} | options))


def test_what_is_chosen_is_said_once(store, caplog):
    method = TRAK(make_model(), make_checkpoints(1), store, projection=SparseProjection(24))
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        method.score(make_trainer(), TARGETS, top_k=2, aggregate="mean", interval=0.9)
    assert sum("damping='auto' is" in line for line in caplog.messages) == 1


def test_several_sets_are_refused(store):
    method = TRAK(make_model(), make_checkpoints(1), store, projection=SparseProjection(24))
    with pytest.raises(ValueError, match="interval takes one set of targets, got 2"):
        method.score(make_trainer(), [DataLoader(TARGETS)] * 2, top_k=2, aggregate="mean", interval=0.9)
