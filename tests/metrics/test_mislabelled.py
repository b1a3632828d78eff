"""Detection curves against scikit-learn and by hand, and wrong labels that are wrong as asked."""

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader, TensorDataset

from examples.counterfactuals import DigitsMLP
from examples.digits import make_data
from lightning_trak import TRAK, GradientDot
from lightning_trak.metrics.functional import flip_labels, mislabel_detection_curve
from lightning_trak.projections import SparseProjection
from tests.lit import make_trainer


@pytest.mark.parametrize("ties", [False, True])
def test_the_area_follows_from_that_under_the_roc_curve(ties):
    """Found against inspected is found against inspected rightly labelled ones, in other proportions."""
    generator = torch.Generator().manual_seed(0)
    mislabelled = torch.rand(200, generator=generator) < 0.15
    suspicion = torch.randn(200, generator=generator) + mislabelled
    if ties:
        suspicion = suspicion.round()
    share = float(mislabelled.double().mean())
    area = mislabel_detection_curve(suspicion, mislabelled).area
    assert float(area) == pytest.approx((1 - share) * roc_auc_score(mislabelled, suspicion) + share / 2, abs=1e-12)


def test_best_worst_and_ignorant():
    mislabelled = torch.arange(40) < 4
    assert float(mislabel_detection_curve(mislabelled.float(), mislabelled).area) == pytest.approx(0.95)
    assert float(mislabel_detection_curve(-mislabelled.float(), mislabelled).area) == pytest.approx(0.05)
    curve = mislabel_detection_curve(torch.zeros(40), mislabelled)
    assert curve.inspected.tolist() == curve.found.tolist() == [0, 1]
    assert float(curve.area) == 0.5


def test_bad_input_is_refused():
    flags = torch.tensor([True, False, False])
    with pytest.raises(ValueError, match=r"one shape `\(num_train,\)`, but got \(2,\) and torch.bool of \(3,\)"):
        mislabel_detection_curve(torch.zeros(2), flags)
    with pytest.raises(ValueError, match=r"torch\.float32 of"):
        mislabel_detection_curve(torch.zeros(3), flags.float())
    with pytest.raises(ValueError, match="1 are NaN"):
        mislabel_detection_curve(torch.tensor([0, torch.nan, 1]), flags)
    with pytest.raises(ValueError, match="0 of 3 are wrong"):
        mislabel_detection_curve(torch.zeros(3), torch.zeros(3).bool())


@pytest.mark.parametrize("classes", [[0, 1], [3, 5, 9]])
def test_flipped_labels_are_other_classes_drawn_uniformly(classes):
    labels = torch.tensor(classes)[torch.arange(3000) % len(classes)]
    before = torch.get_rng_state()
    flipped, mislabelled = flip_labels(labels, 0.2, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    assert int(mislabelled.sum()) == 600
    assert torch.equal(flipped != labels, mislabelled)
    assert set(flipped.tolist()) == set(classes)
    pairs = torch.stack([labels, flipped])[:, mislabelled].unique(dim=1, return_counts=True)[1]
    expected = 600 / (len(classes) * (len(classes) - 1))
    assert len(pairs) == len(classes) * (len(classes) - 1)
    assert float((pairs - expected).abs().max()) < 4.5 * expected**0.5
    assert torch.equal(flip_labels(labels, 0.2, seed=3)[0], flipped)
    assert not torch.equal(flip_labels(labels, 0.2, seed=4)[0], flipped)


def test_nothing_to_flip_is_an_error():
    nine = torch.arange(9)
    for labels, fraction in ((torch.zeros_like(nine), 0.1), (nine, 0.01), (nine, 1.5), (nine, float("nan"))):
        with pytest.raises(ValueError, match="Expected labels to flip"):
            flip_labels(labels, fraction)
    with pytest.raises(ValueError, match="Expected integer `labels`"):
        flip_labels(torch.rand(9))


def test_self_influence_finds_wrong_labels_of_digits(tmp_path):
    images, labels = (part[:500] for part in make_data()[0].tensors)
    spoilt, mislabelled = flip_labels(labels, 0.1, seed=0)
    data = TensorDataset(images, spoilt)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DigitsMLP()
        make_trainer(max_epochs=20).fit(model, DataLoader(data, batch_size=100, shuffle=True))
    draws = torch.rand(1000, len(data))
    by_chance = max(mislabel_detection_curve(suspicion, mislabelled).area for suspicion in draws)
    for method in (TRAK, GradientDot):
        attribution = method(model, [model.state_dict()], tmp_path, projection=SparseProjection(256))
        attribution.featurize(make_trainer(), data)
        area = mislabel_detection_curve(attribution.self_influence(make_trainer()), mislabelled).area
        assert by_chance < area <= 0.95
