"""The damping that is chosen from the features."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from lightning_trak import TRAK
from lightning_trak.features.rows import Features
from lightning_trak.features.store import FeatureStore
from lightning_trak.methods.influence import InfluenceFunction
from lightning_trak.outputs import ClassificationMargin
from lightning_trak.scoring import PrimalScorer
from lightning_trak.scoring.damping import absolute_damping, auto_damping, require_damping
from lightning_trak.scoring.newton.gram import gram_matrix
from lightning_trak.scoring.newton.noise import Noise

CPU = torch.device("cpu")


def make_rows(phi, curvatures):
    return Features(phi, torch.zeros(len(phi)), torch.ones(len(phi)), curvatures)


def chosen(phi, curvatures, curvature="gauss_newton"):
    return chosen_for([make_rows(phi, curvatures)], curvature)


def chosen_for(shards, curvature="gauss_newton"):
    gram, squared_weights = gram_matrix(shards, curvature, shards[0].features.shape[1], CPU)
    return auto_damping(gram.trace(), squared_weights, len(gram))


def test_examples_alike_count_all():
    phi = torch.nn.functional.normalize(torch.randn(40, 6, dtype=torch.float64))
    assert chosen(phi, torch.ones(40)) == pytest.approx(1.75 * 6 / 40)


def test_examples_without_curvature_do_not_count():
    phi = torch.nn.functional.normalize(torch.randn(40, 6, dtype=torch.float64))
    curvatures = torch.zeros(40)
    curvatures[:5] = 0.2
    assert chosen(phi, curvatures) == pytest.approx(1.75 * 6 / 5)
    assert chosen(phi, curvatures, "identity") == pytest.approx(1.75 * 6 / 40)


def test_absolute_damping_is_a_multiple_of_what_a_carrying_example_adds():
    phi, curvatures = torch.randn(30, 5, dtype=torch.float64), torch.rand(30, dtype=torch.float64)
    weights = curvatures * phi.square().sum(1)
    gram, _ = gram_matrix([make_rows(phi, curvatures)], "gauss_newton", 5, CPU)
    absolute = chosen(phi, curvatures) * gram.diagonal().mean()
    torch.testing.assert_close(absolute, 1.75 * weights.square().sum() / weights.sum())


def test_no_scale_and_no_order_matters():
    phi, curvatures = torch.randn(30, 5, dtype=torch.float64), torch.rand(30)
    order = torch.randperm(30)
    expected = chosen(phi, curvatures)
    assert chosen(phi[order] * 1e-3, curvatures[order] * 7) == pytest.approx(expected)
    halves = [make_rows(phi[:11], curvatures[:11]), make_rows(phi[11:], curvatures[11:])]
    assert chosen_for(halves) == pytest.approx(expected)


def test_each_checkpoint_gets_its_own(tmp_path):
    store = FeatureStore(tmp_path, {"checkpoints": ["a", "b"], "dtype": "float32"}, 20, shard_size=8)
    phi = torch.randn(2, 20, 4)
    curvatures = torch.stack([torch.ones(20), torch.rand(20) ** 8])
    for checkpoint in range(2):
        for shard in range(store.num_shards):
            examples = list(store.shard(shard))
            store.write(checkpoint, shard, make_rows(phi[checkpoint, examples], curvatures[checkpoint, examples]))
    targets = torch.randn(3, 4)

    def scorer_of(damping):
        scorer = PrimalScorer(store, "gauss_newton", damping, "per_checkpoint", 0.0)
        scorer.fit(CPU)
        return scorer

    def directions(damping, checkpoint):
        return scorer_of(damping).precondition(checkpoint, targets)

    noise = Noise(2)
    noise.add(torch.ones(2, 20), curvatures)
    noise.lags = scorer_of("auto").noise.lags
    for checkpoint, level in enumerate(noise.levels(weighted=True)):
        damping = level * chosen(phi[checkpoint], curvatures[checkpoint])
        torch.testing.assert_close(directions("auto", checkpoint), directions(damping, checkpoint))
    assert chosen(phi[1], curvatures[1]) > 1.5 * chosen(phi[0], curvatures[0])


@pytest.mark.parametrize(
    "damping",
    [float("inf"), np.float32("inf"), float("nan"), -float("inf"), -1, "Auto", None, [0.1], True, 10**400],
)
def test_damping_that_is_no_number_is_refused_at_construction(tmp_path, damping):
    model = torch.nn.Linear(2, 2)
    weights = [model.state_dict()]
    with pytest.raises(ValueError, match="damping must be at least 0 and finite, or 'auto'; got"):
        require_damping(damping)
    with pytest.raises(ValueError, match="damping must be at least 0 and finite, or 'auto'; got"):
        TRAK(model, weights, tmp_path, output=ClassificationMargin(), damping=damping)
    with pytest.raises(ValueError, match="damping must be at least 0 and finite, or 'auto'; got"):
        InfluenceFunction(model, weights, output=ClassificationMargin(), damping=damping)


def test_dampings_that_are(recwarn):
    assert [require_damping(value) for value in ("auto", 0, 0.5, 10**30, np.float32(2))] == ["auto", 0, 0.5, 1e30, 2]
    assert f"{require_damping(Fraction(1, 2)):g}" == "0.5"  # as errors show it
    assert not recwarn  # numbers of few bits would overflow if they were compared with large ones


def noise_of(gradients, curvatures, seen=None):
    noise = Noise(len(curvatures))
    for columns in torch.arange(gradients.shape[1]).split(7):  # as shards come
        noise.add(gradients[:, columns], curvatures[:, columns], None if seen is None else seen[:, columns])
    return noise


def outputs(count, size=400, seed=0):
    return torch.randn(count, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_dispersion_is_low_for_labels_that_fit_and_one_for_probabilities_that_are_right():
    logits = 3 * outputs(1, 20_000)
    right = torch.rand(logits.shape, generator=torch.Generator().manual_seed(1)) < logits.sigmoid()
    margins = torch.where(right, logits, -logits)
    p = margins.sigmoid()
    calibrated = noise_of(1 - p, p * (1 - p))
    assert float(calibrated.total("seen_squares") / calibrated.total("seen_curvatures")) == pytest.approx(1, abs=0.05)
    fitted = (margins.abs() + 4).sigmoid()
    assert noise_of(1 - fitted, fitted * (1 - fitted)).dispersions[0] < 0.02
    wrong = 1 - fitted
    assert noise_of(1 - wrong, wrong * (1 - wrong)).dispersions == [1.0]


@pytest.mark.parametrize("curvature", [2.0, 0.1, 0.0])
def test_a_loss_without_a_scale_has_dispersion_and_agreement_one(curvature):
    noise = noise_of(1e3 * outputs(3), torch.full((3, 400), curvature))
    assert noise.dispersions == [1.0] * 3
    assert noise.agreement == 1.0
    assert noise.levels(weighted=True) == [1.0] * 3


def test_dispersion_is_never_so_small_that_nothing_is_damped():
    p = (outputs(1).abs() + 25).sigmoid()
    assert noise_of(1 - p, p * (1 - p)).dispersions == [0.01]


def test_agreement_is_the_mean_correlation():
    curvatures = outputs(4).sigmoid() + outputs(1, seed=1).sigmoid()
    expected = np.corrcoef(curvatures.numpy()).mean()
    noise = noise_of(outputs(4), curvatures * torch.tensor([1e-6, 1, 10, 1e4])[:, None])
    assert noise.agreement == pytest.approx(expected)
    assert 0.25 < expected < 1


def test_copies_of_a_checkpoint_want_the_damping_of_one():
    gradients, curvatures = outputs(1), outputs(1, seed=1).sigmoid()
    once, often = noise_of(gradients, curvatures), noise_of(gradients.expand(5, -1), curvatures.expand(5, -1))
    torch.testing.assert_close(torch.tensor(often.levels(True)), torch.tensor(once.levels(True) * 5))
    unlike = noise_of(outputs(5), outputs(5, seed=2).sigmoid())
    assert unlike.agreement == pytest.approx(1 / 5, abs=0.05)


def test_models_of_halves_count_what_they_have_seen():
    gradients, curvatures = outputs(2, seed=3).abs(), outputs(2, seed=4).sigmoid()
    seen = torch.zeros(2, 400, dtype=torch.bool)
    seen[0, :100], seen[1, 100:300] = True, True
    gradients[~seen] = 1e6
    noise = noise_of(gradients, curvatures, seen)
    assert noise.shares == [0.25, 0.5]
    for number, dispersion in enumerate(noise.dispersions):
        q, r = gradients[number, seen[number]], curvatures[number, seen[number]]
        assert dispersion == pytest.approx(min(1, float(q.square().sum() / r.sum())))
    levels = noise.levels(weighted=False)
    assert levels[1] == pytest.approx(2 * levels[0])


def test_noise_says_why():
    p = torch.tensor([[0.6, 0.9, 0.99, 0.7], [0.6, 0.8, 0.9, 0.99]])
    noise = noise_of(1 - p, p * (1 - p))
    low, high = sorted(noise.dispersions)
    said = f" (the dispersion of the loss is {low:.2g} to {high:.2g}, the agreement of the checkpoints"
    assert noise.describe(weighted=True) == f"{said} {noise.agreement:.2g})"
    assert noise_of(1 - p[:1], p[:1]).describe(weighted=False) == ""
    halves = noise_of(1 - p[:1], p[:1], torch.tensor([[True, True, False, False]]))
    assert halves.describe(weighted=False) == " (the share of the examples seen 0.5)"


def test_absolute_damping_takes_the_noise_for_auto_alone():
    weights = torch.rand(9, dtype=torch.float64)
    once = absolute_damping("auto", weights, 4, "here")
    assert absolute_damping("auto", weights, 4, "here", 0.1) == pytest.approx(0.1 * once)
    assert absolute_damping(0.5, weights, 4, "here", 0.1) == absolute_damping(0.5, weights, 4, "here")
