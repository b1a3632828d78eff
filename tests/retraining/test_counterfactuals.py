"""Proponents taken away: from the right targets, read at the right targets, and summed up as SciPy would."""

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak.outputs import RegressionOutput
from lightning_trak.retraining import Brittleness, Counterfactuals, joint_removal_mask, removal_masks
from lightning_trak.retraining.estimates import Estimate, proportion_of
from tests.lit import LitNet, make_trainer
from tests.retraining.brittleness import make_brittleness


def test_masks_lack_the_highest_scores():
    scores = torch.tensor([[0.5, 2.0, -1.0, 1.0], [0.0, 0.0, 0.0, -1.0]])
    expected = [[True, False, True, False], [False, False, True, True]]  # of equal ones, the first
    assert removal_masks(scores, 2).tolist() == expected


def test_targets_take_turns_where_they_share_a_set():
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0], [300.0, 0.0, 100.0, 200.0]])
    expected = {1: [0], 2: [0, 1], 3: [0, 1, 3]}  # the first of both, then the second of the one and of the other
    for k, removed in expected.items():
        assert (~joint_removal_mask(scores, k)).nonzero().flatten().tolist() == removed
    assert joint_removal_mask(scores[:1], 2).tolist() == removal_masks(scores[:1], 2)[0].tolist()


@pytest.mark.parametrize("function", [removal_masks, joint_removal_mask])
@pytest.mark.parametrize(
    ("scores", "k", "match"),
    [
        (torch.zeros(2, 3), 0, "`k` to be a positive integer but got 0"),
        (torch.zeros(2, 3), 3, "less than the 3 training examples, got 3"),
        (torch.zeros(3), 1, r"got shape \(3,\)"),
        (torch.tensor([[torch.nan, 1]]), 1, "with 1 NaNs"),
    ],
)
def test_masks_that_do_not_exist(function, scores, k, match):
    with pytest.raises(ValueError, match=match):
        function(scores, k)


class Mean(LitNet):
    """Learns the mean of the labels it is trained on, whatever the target: one step of the right size."""

    def __init__(self):
        super().__init__()
        for name in ("first", "norm", "dropout", "head"):
            delattr(self, name)
        self.guess = nn.Parameter(torch.rand(()) * 0.02)  # seeds differ a little

    def forward(self, inputs):
        return inputs.sum(1) * 0 + self.guess

    def configure_model_output(self):
        return RegressionOutput()

    def training_step(self, batch):
        return F.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5 * 0.99)


LABELS = torch.arange(8.0)
TRAIN = DataLoader(TensorDataset(torch.zeros(8, 1), LABELS), batch_size=8)
TARGETS = TensorDataset(torch.zeros(3, 1), torch.tensor([0.0, 1.0, 2.0]))  # output: the mean of all minus these
SCORES = {"up": torch.stack([LABELS, -LABELS, (LABELS - 3).abs().neg()]), "down": -LABELS.expand(3, 8)}


def counterfactuals(directory, **options):
    def one_epoch():
        return make_trainer(max_epochs=1)

    scores = options.pop("scores", SCORES)
    return Counterfactuals(directory, Mean, one_epoch, TRAIN, TARGETS, scores, options.pop("ks", (3, 1)), **options)


@pytest.mark.parametrize("together", [None, 4])
def test_each_target_is_read_from_the_models_without_its_own_proponents(tmp_path, together):
    removal = counterfactuals(tmp_path, num_seeds=2, num_references=3)
    assert removal.fleet.masks.shape == (3 + 2 * 2 * 3, 8)
    with pytest.raises(RuntimeError, match="lacks 30 of 30 members"):
        removal.brittleness()
    removal.run(together=together, progress_bar=False)
    found = removal.brittleness()
    assert found.ks == (1, 3)
    for row, name in enumerate(("up", "down")):
        for column, k in enumerate((1, 3)):
            for target in range(3):
                kept = SCORES[name][target].argsort(descending=True, stable=True)[k:]
                means = LABELS[kept].mean() * 0.99 - target
                torch.testing.assert_close(found.outputs[row, column, target], means.expand(2), atol=3e-4, rtol=0)
                fall = float((LABELS.mean() - LABELS[kept].mean()) * 0.99)
                assert float(found.drops[row, column, target]) == pytest.approx(fall, abs=3e-4)
    assert found.references.shape == (3, 3, 2)
    assert float(found.references.std()) > 0


def test_drops_and_flips_and_their_intervals():
    found = make_brittleness()
    reference, means = found.references.double().mean((1, 2)), found.outputs.double().mean(3)
    drop, flips = found.drop(num_bootstraps=4000), found.flips(0.9)
    right = reference > 0
    assert 0 < int(right.sum()) < 40
    for row in range(2):
        for column in range(2):
            drops = (reference - means[row, column]).numpy()
            expected = scipy.stats.bootstrap((drops,), np.mean, method="percentile", rng=1).confidence_interval
            assert float(drop.mean[row, column]) == pytest.approx(drops.mean())
            width = expected.high - expected.low
            assert float(drop.low[row, column]) == pytest.approx(expected.low, abs=0.06 * width)
            assert float(drop.high[row, column]) == pytest.approx(expected.high, abs=0.06 * width)
            flipped = int((right & (means[row, column] <= 0)).sum())
            test = scipy.stats.binomtest(flipped, int(right.sum()))
            expected = test.proportion_ci(0.9, method="wilson")
            assert float(flips.mean[row, column]) == pytest.approx(test.statistic)
            assert float(flips.low[row, column]) == pytest.approx(expected.low)
            assert float(flips.high[row, column]) == pytest.approx(expected.high)


@pytest.mark.parametrize(("successes", "total"), [(1.25, 7.5), (0, 4), (12.75, 12.75), (0.4, 0.9)])
def test_intervals_of_fractional_counts_invert_the_score_test(successes, total):
    """Wilson's interval holds the proportions p with |share - p| <= z sqrt(p (1 - p) / total)."""
    found = proportion_of(torch.tensor(successes), total, 0.9)
    share, z = successes / total, scipy.stats.norm.ppf(0.95)

    def excess(p):
        return (share - p) ** 2 - z**2 * p * (1 - p) / total

    low = scipy.optimize.brentq(excess, 0, share - 1e-9) if share > 0 else 0
    high = scipy.optimize.brentq(excess, share + 1e-9, 1) if share < 1 else 1
    assert float(found.mean) == pytest.approx(share)
    assert float(found.low) == pytest.approx(low)
    assert float(found.high) == pytest.approx(high)


def test_noise_is_what_references_say_of_each_other():
    found = make_brittleness()
    means, flipped, counted = found.references.double().mean(2), 0, 0
    for number in range(4):
        others = means[:, [other for other in range(4) if other != number]].mean(1)
        counted += int((others > 0).sum())
        flipped += int(((others > 0) & (means[:, number] <= 0)).sum())
    assert flipped > 0
    noise = found.noise_flips()
    assert float(noise.mean) == pytest.approx(flipped / counted)
    assert 0 <= float(noise.low) < float(noise.mean) < float(noise.high)


def test_metrics_and_table_hold_the_numbers():
    found = make_brittleness()
    metrics = found.metrics()
    assert len(metrics) == 1 + 2 * 2 * 2 * 3
    assert metrics["good/drop_50"] == float(found.drop().mean[0, 1])
    assert metrics["bad/flips_5_high"] == float(found.flips().high[1, 0])
    table = found.table()
    assert [row[:2] for row in table.rows[:4]] == [("good", 5), ("good", 50), ("bad", 5), ("bad", 50)]
    fall, low, high = (metrics[f"good/drop_50{end}"] for end in ("", "_low", "_high"))
    assert table.rows[1][2] == f"{fall:.2f} ({low:.2f} to {high:.2f})"
    assert table.rows[1][3].startswith(f"{metrics['good/flips_50']:.0%} (")
    assert table.markdown().splitlines()[3].startswith(f"| good | 50 | {fall:.2f} (")


def test_nothing_can_flip_that_is_wrong_already():
    found = Brittleness(("m",), (1,), torch.full((1, 1, 4, 2), -3.0), torch.full((4, 2, 2), -1.0))
    assert not found.counted.any()
    assert found.flips().mean.isnan().all()
    assert float(found.drop().mean) == 2
    with pytest.raises(ValueError, match="confidence must be strictly between 0 and 1, got 95"):
        found.flips(95)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"scores": {"mine": torch.zeros(8, 3)}}, r'scores of "mine" must have shape .* = \(3, 8\), got \(8, 3\)'),
        ({"scores": {}}, "got 0 and 2"),
        ({"ks": ()}, "got 2 and 0"),
        ({"scores": {"mine": torch.full((3, 8), torch.nan)}}, 'scores of "mine" are not finite in 24 places'),
        ({"ks": (8,)}, "less than the 8 training examples"),
        ({"ks": (1.5,)}, "`k` to be a positive integer but got 1.5"),
        ({"num_references": 2.5}, "`num_references` to be a positive integer but got 2.5"),
        ({"num_references": 1}, "num_references must be at least 2"),
    ],
)
def test_bad_arguments_leave_nothing_behind(tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        counterfactuals(tmp_path / "fleet", **options)
    assert not (tmp_path / "fleet").exists()


def test_numbers_of_proponents_are_several(tmp_path):
    with pytest.raises(TypeError, match=r"expected ks as numbers of proponents, such as \(10, 40\), got 3"):
        counterfactuals(tmp_path, ks=3)


def test_an_estimate_of_no_targets_is_not_written():
    share = proportion_of(torch.tensor([1, 0]), torch.tensor([2, 0]), 0.95)
    assert share.written(".0%", 0).startswith("50% (")
    assert share.written(".0%", 1) == ""


def test_an_interval_that_is_the_number_is_not_written():
    half, wide = torch.tensor(0.5), Estimate(torch.tensor(0.5), torch.tensor(0.4), torch.tensor(0.5))
    assert Estimate(half, half + 1e-6, half).written(".2f") == "0.50"
    assert wide.written(".2f") == "0.50 (0.40 to 0.50)"
    assert Estimate(half * torch.nan, half, half).written(".2f") == ""
