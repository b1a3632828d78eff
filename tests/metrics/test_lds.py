"""The functional linear datamodeling score: ranks, prediction of subsets, interval and noise ceiling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_trak.metrics import LinearDatamodelingScore
from lightning_trak.metrics.functional import (
    bootstrap_interval,
    crossed_bootstrap_interval,
    linear_datamodeling_interval,
    linear_datamodeling_score,
    noise_ceiling,
    rank_rows,
    spearman_corrcoef,
    spearman_influence,
)

NUM_SUBSETS, NUM_TRAIN = 16, 30


def half_subsets(num_subsets=NUM_SUBSETS, num_train=NUM_TRAIN, generator=None):
    return torch.rand(num_subsets, num_train, generator=generator).argsort(dim=1) < num_train // 2


@pytest.fixture
def task():
    """Scores, noisy outputs with three seeds, masks."""
    generator = torch.Generator().manual_seed(0)
    masks = half_subsets(generator=generator)
    scores = torch.randn(12, NUM_TRAIN, generator=generator)
    noise = torch.randn(12, NUM_SUBSETS, 3, generator=generator)
    return scores, (scores @ masks.float().T)[..., None] + 2 * noise, masks


def scipy_lds(scores, outputs, masks):
    predictions = scores.double().numpy() @ masks.numpy().astype(float).T
    return np.array(
        [stats.spearmanr(p, y).statistic for p, y in zip(predictions, outputs.double().numpy(), strict=True)]
    )


class TestRanking:
    @pytest.mark.parametrize("levels", [2, 5, 1000])
    def test_ranks_and_correlations_match_scipy_with_ties(self, levels):
        generator = torch.Generator().manual_seed(levels)
        x, y = torch.randint(levels, (2, 40, 33), generator=generator).float()
        expected = [stats.spearmanr(a, b).statistic for a, b in zip(x.numpy(), y.numpy(), strict=True)]
        np.testing.assert_array_equal(rank_rows(x).numpy(), stats.rankdata(x.numpy(), axis=1))
        np.testing.assert_allclose(spearman_corrcoef(x, y).numpy(), expected, atol=1e-12)

    def test_more_ties_than_int32_sums_can_hold(self):
        x = torch.zeros(1, 150_000)
        x[0, 100_000:] = 1
        y = torch.arange(150_000.0)[None] % 7 + x
        expected = stats.spearmanr(x[0].numpy(), y[0].numpy()).statistic
        assert spearman_corrcoef(x, y).item() == pytest.approx(expected, abs=1e-9)

    def test_float64_differences_below_float32_resolution_count(self):
        x = 1 + torch.arange(5, dtype=torch.float64)[None] * 1e-12
        assert spearman_corrcoef(x, torch.arange(5.0)[None]).item() == 1

    def test_constant_rows_have_none(self):
        x = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 3.0]])
        assert spearman_corrcoef(x, x.flip(1)).isnan().tolist() == [True, False]

    @pytest.mark.parametrize("shapes", [((3, 4), (3, 5)), ((4,), (4,)), ((3, 1), (3, 1))])
    def test_shapes_are_checked(self, shapes):
        with pytest.raises(ValueError, match=r"one shape `\(num_rows, num_values\)`.*but got"):
            spearman_corrcoef(*map(torch.zeros, shapes))

    @pytest.mark.parametrize("levels", [4, 10_000])
    def test_influence_is_the_derivative_of_the_weighted_correlation(self, levels):
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randint(levels, (2, 3, 20), generator=generator).double()

        def weighted(a, b, weights):
            """Correlation of the weighted mid-distribution functions, by their definition."""
            grades = [((v[None] < v[:, None]) + 0.5 * (v[None] == v[:, None])).double() @ weights for v in (a, b)]
            f, g = (grade - grade @ weights for grade in grades)
            return (weights * f * g).sum() / ((weights * f * f).sum() * (weights * g * g).sum()).sqrt()

        for row, influence in enumerate(spearman_influence(x, y)):
            uniform = torch.full((20,), 1 / 20, dtype=torch.float64)
            expected = torch.autograd.functional.jacobian(lambda w, r=row: weighted(x[r], y[r], w / w.sum()), uniform)
            torch.testing.assert_close(influence, expected, rtol=0, atol=1e-12)


class TestScore:
    def test_matches_scipy(self, task):
        scores, outputs, masks = task
        expected = scipy_lds(scores, outputs.mean(2), masks)
        np.testing.assert_allclose(linear_datamodeling_score(scores, outputs, masks), expected.mean(), atol=1e-6)
        per_target = linear_datamodeling_score(scores, outputs[..., 0], masks, reduction="none")
        np.testing.assert_allclose(per_target, scipy_lds(scores, outputs[..., 0], masks), atol=1e-6)

    def test_sign(self, task):
        scores, _, masks = task
        truth = scores @ masks.float().T
        assert linear_datamodeling_score(scores, truth.double(), masks) > 0.999
        assert linear_datamodeling_score(-scores, truth.double(), masks) < -0.999

    def test_half_precision_scores_are_summed_in_float64(self):
        masks = half_subsets(8, 4000, torch.Generator().manual_seed(0))
        scores = torch.randn(3, 4000, generator=torch.Generator().manual_seed(1)).half()
        truth = scores.double() @ masks.double().T
        assert linear_datamodeling_score(scores, truth, masks).item() == pytest.approx(1)

    def test_train_axis_in_blocks(self, task, monkeypatch):
        scores, outputs, masks = task
        whole = linear_datamodeling_score(scores, outputs, masks)
        monkeypatch.setattr("lightning_trak.metrics.functional.lds._TRAIN_BLOCK", 7)
        torch.testing.assert_close(linear_datamodeling_score(scores, outputs, masks), whole)

    def test_equal_sums_tie_whatever_their_order_of_summation(self):
        generator = torch.Generator().manual_seed(0)
        masks = half_subsets(40, 1000, generator)
        scores = torch.zeros(5, 1000)
        scores[:, ::100] = 0.1  # ten equal scores: only eleven sums are possible
        counts = masks[:, ::100].sum(dim=1).double()
        outputs = torch.randn(5, 40, generator=generator)
        expected = spearman_corrcoef(counts.expand(5, -1), outputs)
        values = linear_datamodeling_score(scores, outputs, masks, reduction="none")
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-12)

    def test_large_offset_with_small_differences_is_resolved(self):
        masks = half_subsets(12, 1000, torch.Generator().manual_seed(0))
        small = torch.randn(4, 1000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        truth = small @ masks.double().T
        assert linear_datamodeling_score(1e6 + small, truth, masks).item() == pytest.approx(1)

    @pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1e30])
    def test_constant_scores_are_constant_despite_rounding(self, task, value):
        _, outputs, masks = task
        scores = torch.full((12, NUM_TRAIN), value)
        assert linear_datamodeling_score(scores, outputs, masks, constant_rows="ignore").isnan()

    def test_policies_for_constant_rows(self, task):
        scores, outputs, masks = task
        outputs = outputs.mean(2)
        scores[2], outputs[5] = 0, 7
        expected = scipy_lds(scores[[0, 1, 3, 4, *range(6, 12)]], outputs[[0, 1, 3, 4, *range(6, 12)]], masks)
        zero = linear_datamodeling_score(scores, outputs, masks)
        ignore = linear_datamodeling_score(scores, outputs, masks, constant_rows="ignore")
        values = linear_datamodeling_score(scores, outputs, masks, constant_rows="ignore", reduction="none")
        assert zero.item() == pytest.approx(expected.sum() / 12)
        assert ignore.item() == pytest.approx(expected.mean())
        assert values.isnan().nonzero().flatten().tolist() == [2, 5]
        with pytest.raises(ValueError, match=r"2 of 12 targets.*first is row 2, whose predicted outputs are constant"):
            linear_datamodeling_score(scores, outputs, masks, constant_rows="error")
        with pytest.raises(ValueError, match=r"1 of 9 targets.*first is row 2, whose true outputs are constant"):
            linear_datamodeling_score(scores[3:], outputs[3:], masks, constant_rows="error")


class TestWrongInput:
    def test_masks(self, task):
        scores, outputs, masks = task
        cases = [
            (masks.long(), "dtype torch.bool, but got torch.int64.*indices into masks"),
            (masks[:2], r"at least 3 subsets.*\(2, 30\)"),
            (masks[0], r"`\(num_subsets, num_train\)`.*\(30,\)"),
            (torch.ones_like(masks), "rows 0 and 1 .* are equal"),
            (masks[[0, 1, 2, 3, 1]], "rows 1 and 4 .* are equal.*num_seeds"),
            (torch.where(torch.arange(NUM_SUBSETS)[:, None] == 3, False, masks), "row 3 is empty"),
        ]
        for wrong, message in cases:
            with pytest.raises(ValueError, match=message):
                linear_datamodeling_score(scores, outputs, wrong)
            with pytest.raises(ValueError, match=message):
                LinearDatamodelingScore(wrong)

    def test_shapes(self, task):
        scores, outputs, masks = task
        cases = [
            ((scores[:, 1:], outputs, masks), r"num_train = 30.*but got \(12, 29\)\.$"),
            ((scores, outputs, masks.T), r"\(30, 16\), but got \(12, 30\)\. Is `masks` transposed"),
            ((scores[0], outputs, masks), r"`\(num_targets, num_train\)`.*but got \(30,\)"),
            ((scores, outputs[:, :, 0].T, masks), r"num_subsets = 16, but got \(16, 12\)\. Is `outputs` transposed"),
            ((scores, outputs[:5], masks), r"num_targets = 12.*but got \(5, 16, 3\)"),
            ((scores, outputs[:, :, :0], masks), r"but got \(12, 16, 0\)"),
            ((scores[:0], outputs[:0], masks), r"at least one target.*\(0, 30\)"),
            ((scores, outputs.to("meta"), masks), "on one device, but got cpu, meta and cpu"),
        ]
        for arguments, message in cases:
            with pytest.raises(ValueError, match=message):
                linear_datamodeling_score(*arguments)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_not_finite(self, task, bad):
        scores, outputs, masks = task
        scores[4, 3] = bad
        with pytest.raises(ValueError, match=r"finite `scores`, but 1 of 12 rows.*row 4"):
            linear_datamodeling_score(scores, outputs, masks)
        scores[4, 3] = 0
        outputs[7:, 2, 1] = -bad
        with pytest.raises(ValueError, match=r"finite `outputs`, but 5 of 12 rows.*row 7"):
            linear_datamodeling_score(scores, outputs, masks)

    def test_options(self, task):
        with pytest.raises(ValueError, match="constant_rows must be one of 'zero', 'ignore', 'error'; got 'drop'"):
            linear_datamodeling_score(*task, constant_rows="drop")
        with pytest.raises(ValueError, match="constant_rows must be one of 'zero', 'ignore', 'error'; got 'drop'"):
            LinearDatamodelingScore(task[2], constant_rows="drop")
        with pytest.raises(ValueError, match="reduction must be one of 'mean', 'none'; got 'sum'"):
            linear_datamodeling_score(*task, reduction="sum")
        with pytest.raises(ValueError, match="between 0 and 1, but got 95"):
            linear_datamodeling_interval(*task, confidence=95)
        with pytest.raises(ValueError, match=r"at least 200.*confidence 0.99, but got 50"):
            linear_datamodeling_interval(*task, confidence=0.99, num_bootstraps=50)
        with pytest.raises(ValueError, match=r"at least 2 targets.*but got 1"):
            linear_datamodeling_interval(task[0][:1], task[1][:1], task[2])
        with pytest.raises(ValueError, match=r"at least 2 rows and 2 columns.*but got shape"):
            crossed_bootstrap_interval(torch.zeros(3, 1))


def test_the_plain_bootstrap():
    values = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)) + torch.arange(3)[:, None]
    ends = bootstrap_interval(values, confidence=0.9, num_bootstraps=8000)
    assert ends.shape == (2, 3)
    for row, (low, high) in zip(values.double().numpy(), ends.T.tolist(), strict=True):
        test = stats.bootstrap((row,), np.mean, confidence_level=0.9, method="percentile", rng=0)
        assert [low, high] == pytest.approx(test.confidence_interval, abs=0.03)
    difference = bootstrap_interval(values[1] - values[0])
    torch.testing.assert_close(bootstrap_interval(values[0] - values[1]), -difference.flip(0))
    with pytest.raises(ValueError, match=r"sample in the last dimension, but got shape \(3, 0\)"):
        bootstrap_interval(torch.zeros(3, 0))
    assert bootstrap_interval(torch.ones(3, 1)).isnan().all()
    with pytest.raises(ValueError, match=r"at least 200.*confidence 0.99, but got 50"):
        bootstrap_interval(values, 0.99, 50)


class TestInterval:
    @pytest.mark.parametrize(
        ("rows", "columns", "row_sd", "column_sd"), [(15, 20, 0.2, 0.3), (30, 12, 0, 0), (8, 40, 1, 0)]
    )
    def test_covers_the_mean_of_a_crossed_model(self, rows, columns, row_sd, column_sd):
        """Row, column and interaction effects of known size; the interaction alone triples a naive variance."""
        generator = torch.Generator().manual_seed(1)
        repeats, covered, width = 300, 0, 0.0
        for seed in range(repeats):
            a = row_sd * torch.randn(rows, 1, generator=generator)
            b = column_sd * torch.randn(1, columns, generator=generator)
            table = 0.5 + a + b + torch.randn(rows, columns, generator=generator)
            low, high = crossed_bootstrap_interval(table, num_bootstraps=400, seed=seed).tolist()
            covered += low <= 0.5 <= high
            width += (high - low) / repeats
        truth = (row_sd**2 / rows + column_sd**2 / columns + 1 / (rows * columns)) ** 0.5
        assert 0.91 <= covered / repeats <= 0.985
        assert 3.8 * truth < width < 5.6 * truth  # a known Gaussian: 3.92

    def test_covers_the_score_of_a_known_model(self):
        """Targets share directions, so subset noise does not average out over them."""
        generator = torch.Generator().manual_seed(0)
        shared = torch.randn(2, NUM_TRAIN, generator=generator)

        def draw(num_targets, num_subsets):
            masks = half_subsets(num_subsets, NUM_TRAIN, generator)
            weights = torch.randn(num_targets, 2, generator=generator) @ shared
            scores = weights + 2 * torch.randn(num_targets, NUM_TRAIN, generator=generator)
            noise = 3 * torch.randn(num_targets, num_subsets, generator=generator)
            return scores, weights @ masks.float().T + noise, masks

        draws = [draw(20, 20) for _ in range(250)]
        expected = torch.stack([linear_datamodeling_score(*d) for d in draws]).mean()
        ends = torch.stack([linear_datamodeling_interval(*d, num_bootstraps=400, seed=i) for i, d in enumerate(draws)])
        covered = ((ends[:, 0] <= expected) & (expected <= ends[:, 1])).double().mean()
        assert 0.91 <= covered <= 0.985

    def test_wider_with_confidence_and_fixed_by_seed(self, task):
        state = torch.get_rng_state()
        first = linear_datamodeling_interval(*task, confidence=0.8)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(first, linear_datamodeling_interval(*task, confidence=0.8))
        assert not torch.equal(first, linear_datamodeling_interval(*task, confidence=0.8, seed=1))
        wide = linear_datamodeling_interval(*task, confidence=0.99)
        assert wide[0] < first[0] < linear_datamodeling_score(*task) < first[1] < wide[1]

    def test_in_pieces(self, monkeypatch):
        table = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
        whole = crossed_bootstrap_interval(table, num_bootstraps=4000)
        monkeypatch.setattr("lightning_trak.metrics.functional.bootstrap._MAX_COUNTS", 70)
        pieces = crossed_bootstrap_interval(table, num_bootstraps=4000)
        torch.testing.assert_close(pieces, whole, rtol=0, atol=0.1 * float(whole[1] - whole[0]))

    @pytest.mark.parametrize("rows", [[1, 1, 1, 0.9], [1, 0.9], [1] * 9 + [0.5]])
    def test_equal_rows_among_few(self, rows):
        """Replicates of equal rows alone have no spread. This must not make the interval as wide as all values."""
        values = torch.tensor(rows).double()
        low, high = crossed_bootstrap_interval(values[:, None].expand(-1, 6))
        assert min(rows) - 0.25 < low < values.mean() < high < 1.25
        assert low < values.mean() - values.std() / len(rows) ** 0.5

    def test_perfect_agreement_has_no_width(self, task):
        scores, _, masks = task
        ends = linear_datamodeling_interval(scores, scores.double() @ masks.double().T, masks)
        torch.testing.assert_close(ends, torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-6)

    def test_ignored_targets_do_not_move_it(self, task):
        scores, outputs, masks = task
        with_constant = torch.cat([scores, torch.zeros(1, NUM_TRAIN)]), torch.cat([outputs, outputs[:1]])
        ends = linear_datamodeling_interval(*with_constant, masks, constant_rows="ignore")
        assert torch.equal(ends, linear_datamodeling_interval(scores, outputs, masks))
        assert linear_datamodeling_interval(*with_constant, masks)[0] < ends[0]


class TestNoiseCeiling:
    @pytest.mark.parametrize(("noise", "num_seeds"), [(0.3, 2), (1, 2), (1, 5), (2, 3)])
    def test_estimates_what_a_perfect_prediction_reaches(self, noise, num_seeds):
        generator = torch.Generator().manual_seed(0)
        truth = torch.randn(400, 60, 1, generator=generator)
        outputs = truth + noise * torch.randn(400, 60, num_seeds, generator=generator)
        reached = spearman_corrcoef(truth[..., 0], outputs.mean(2)).mean()
        assert noise_ceiling(outputs).mean().item() == pytest.approx(reached.item(), abs=0.02)

    def test_formula_on_pairs(self, task):
        outputs = task[1]
        for target, value in zip(outputs.numpy(), noise_ceiling(outputs).tolist(), strict=True):
            pairs = [stats.spearmanr(target[:, i], target[:, j]).statistic for i, j in ((0, 1), (0, 2), (1, 2))]
            r = max(np.mean(pairs), 0)
            assert value == pytest.approx((3 * r / (1 + 2 * r)) ** 0.5)

    def test_extremes(self):
        same = torch.arange(8.0)[None, :, None].expand(1, 8, 2)
        assert noise_ceiling(same).item() == pytest.approx(1)
        opposite = torch.stack([same[..., 0], -same[..., 0]], dim=2)
        assert noise_ceiling(opposite).item() == 0
        assert noise_ceiling(torch.ones(1, 8, 2)).item() == 0

    @pytest.mark.parametrize("shape", [(3, 8), (3, 8, 1), (3, 2, 4)])
    def test_shape(self, shape):
        with pytest.raises(ValueError, match="at least 3 subsets and 2 seeds, but got"):
            noise_ceiling(torch.zeros(shape))


def test_one_huge_score_counts_the_same_wherever_it_stands():
    generator = torch.Generator().manual_seed(0)
    masks = half_subsets(20, 2000, generator)
    scores = torch.randn(1, 2000, dtype=torch.float64, generator=generator)
    scores[0, 0] = 1e9
    outputs = scores.clamp(max=10) @ masks.double().T
    first = linear_datamodeling_score(scores, outputs, masks)
    last = linear_datamodeling_score(scores.flip(1), outputs, masks.flip(1))
    assert first == last
    assert float(first) == pytest.approx(scipy_lds(scores, outputs, masks)[0])
