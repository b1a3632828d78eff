"""Scores that are corrected by retrained models: the formula, what it gains, and what it refuses."""

import math

import pytest
import torch

from lightning_trak import LinearDatamodelingScore
from lightning_trak.retraining import informed, informed_scores, random_subsets

TARGETS, N, MEMBERS = 6, 40, 40
MASKS = random_subsets(N, MEMBERS, seed=1)


def make(error=1.0, noise=0.3, seed=0):
    """Scores, true effects that differ from them by a factor of each example and target, and outputs of models."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(TARGETS, N, generator=generator, dtype=torch.float64) ** 3
    effects = scores * (1 + error * torch.randn(TARGETS, N, generator=generator, dtype=torch.float64))
    outputs = 2 * effects @ MASKS.double().T + 5
    return scores, outputs + noise * outputs.std() * torch.randn(outputs.shape, generator=generator).double()


def lds(scores, outputs, kept):
    metric = LinearDatamodelingScore(MASKS[kept])
    metric.update(scores, outputs[:, kept])
    return float(metric.compute())


@pytest.mark.parametrize("noise", [0.5, 30.0])
def test_the_correction_is_the_mean_of_a_gaussian_process(noise):
    """Against the dense covariance of all residuals, formed entry by entry."""
    scores, outputs = make()
    masks = MASKS[:9].double()
    scale = informed._scale(scores, masks, outputs[:, :9])
    regression = informed._Regression(scores, masks, outputs[:, :9], scale)
    (correction,) = regression.corrections([noise])
    centred, mask = outputs[:, :9] - outputs[:, :9].mean(1, keepdim=True), masks - masks.mean(0)
    spread, predicted = centred.square().mean(1, keepdim=True), scores @ mask.T
    assert float(scale) == pytest.approx(float((centred * predicted / spread).sum() / (predicted**2 / spread).sum()))
    residuals = (centred / scale - predicted) / spread.sqrt()
    deviations = scores.sign() * scores.abs() ** 0.75
    deviations *= (scores.square().sum(1) / (scores.abs() ** 1.5).sum(1)).sqrt()[:, None]
    shared = 0.9 * torch.eye(TARGETS).double() + 0.1
    roots = deviations / spread.sqrt()
    prior = torch.einsum("xi,yi,xy,ji,ki->xjyk", roots, roots, shared, mask, mask)
    unit = roots.square() @ mask.square().T
    prior /= unit.mean()
    together = residuals @ residuals.T
    noises = 0.5 * torch.eye(TARGETS).double() + 0.5 * together / together.diagonal().mean()
    covariance = prior.reshape(TARGETS * 9, -1) + noise * torch.kron(noises, torch.eye(9).double())
    solved = torch.linalg.solve(covariance, residuals.flatten()).view(TARGETS, 9)
    expected = torch.einsum("xi,yi,xy,yj,ji->xi", deviations, roots, shared, solved, mask) / unit.mean()
    torch.testing.assert_close(correction, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    torch.testing.assert_close(regression.without_noise(residuals), torch.linalg.solve(noises, residuals))


def gain(seed, members, common=0.0):
    """What the outputs of some models add to the LDS on others, if all outputs of a model also move together."""
    scores, outputs = make(noise=0.3 * (common == 0), seed=seed)
    noise = torch.randn(MEMBERS, generator=torch.Generator().manual_seed(1 + seed)).double()
    noisy, held_out = outputs + common * outputs.std(1, keepdim=True) * noise, slice(30, MEMBERS)
    corrected = informed_scores(scores, MASKS[:members], noisy[:, :members])
    return lds(corrected, outputs, held_out) - lds(scores, outputs, held_out)


def test_more_members_give_better_scores():
    few, many = (sum(gain(seed, members) for seed in range(5)) / 5 for members in (10, 30))
    assert 0.03 < few < many - 0.03


def test_noise_that_targets_share_does_not_pass_for_examples():
    assert sum(gain(seed, 30, common=2) for seed in range(3)) / 3 > 0.1


def test_scores_that_predict_all_there_is_stay_as_they_are():
    scores, _ = make()
    outputs = 3 * scores @ MASKS.double().T - 1
    torch.testing.assert_close(informed_scores(scores, MASKS, outputs), scores, rtol=1e-6, atol=1e-8)
    noise = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(4)).double()
    for seed in range(2):
        order = torch.randperm(MEMBERS, generator=torch.Generator().manual_seed(seed))
        known, held_out = order[:20], order[20:]
        corrected = informed_scores(scores, MASKS[known], (outputs + outputs.std() * noise)[:, known])
        assert lds(corrected, outputs, held_out) > 0.97


def test_units_scales_and_seeds_do_not_matter():
    scores, outputs = make()
    expected = informed_scores(scores, MASKS, outputs)
    state = torch.get_rng_state()
    torch.testing.assert_close(
        informed_scores(1e6 * scores, MASKS, outputs * 1e-5 + 7), 1e6 * expected, rtol=1e-4, atol=1.0
    )
    for unit in (1e-200, 1e200):
        found = informed_scores(unit * scores.double(), MASKS, outputs) / unit
        torch.testing.assert_close(found, informed_scores(scores.double(), MASKS, outputs), rtol=1e-4, atol=1e-4)
    seeds = torch.stack([outputs - 1, outputs + 1], 2)
    torch.testing.assert_close(informed_scores(scores, MASKS, seeds), expected, rtol=1e-5, atol=1e-6)
    assert informed_scores(scores.float(), MASKS, outputs).dtype == torch.float32
    constant = torch.cat([outputs, torch.ones(1, MEMBERS)])  # at the last target all models have the same output
    found = informed_scores(torch.cat([scores, scores[:1]]), MASKS, constant)
    assert found.isfinite().all()
    silent = scores.clone()
    silent[2] = 0
    assert not informed_scores(silent, MASKS, outputs)[2].any()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, m, o: (s, m[:4], o[:, :4]), "at least 5 subsets to learn from, got .*\\(4, 40\\)"),
        (lambda s, m, o: (s[:0], m, o[:0]), "at least one target"),
        (lambda s, m, o: (s[:, 1:], m, o), "Expected `scores` of shape"),
        (lambda s, m, o: (s, m, o.T), "Is `outputs` transposed"),
        (lambda s, m, o: (s, m.float(), o), "Expected `masks` of dtype torch.bool"),
        (lambda s, m, o: (s, torch.cat([m[:1], m[:-1]]), o), "rows 0 and 1 of `masks` are equal"),
        (lambda s, m, o: (s.long(), m, o), "scores of a floating-point dtype, got torch.int64"),
        (lambda s, m, o: (s, m, o.log()), "finite `outputs`"),
        (lambda s, m, o: (s * math.nan, m, o), "finite `scores`"),
        (lambda s, m, o: (-s, m, o), "do not rise with the outputs"),
        (lambda s, m, o: (s * 0, m, o), "do not rise with the outputs"),
        (lambda s, m, o: (s, m, o * 0), "do not rise with the outputs"),
    ],
)
def test_what_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        informed_scores(*change(make()[0], MASKS, make()[1]))


def test_scores_that_are_no_tensor():
    with pytest.raises(TypeError, match=r"Expected `scores` as a torch\.Tensor, but got a list"):
        informed_scores([[1.0]], MASKS, make()[1])


@pytest.mark.parametrize("constant", [0.1, 1 / 3, 1e6 / 3])
def test_a_target_whose_outputs_are_all_the_same_changes_no_other(constant):
    """Their mean is rounded, and what is left is no variance to divide by."""
    scores, outputs = make()
    scores = torch.cat([scores, scores[:1]])

    def informed_by(value):
        constants = torch.full((1, 30), value, dtype=torch.float64)
        return informed_scores(scores, MASKS[:30], torch.cat([outputs[:, :30], constants]))

    torch.testing.assert_close(informed_by(constant), informed_by(0.0))
