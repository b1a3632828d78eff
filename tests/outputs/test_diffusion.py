"""Outputs of diffusion models against their definition; noise that nothing else moves, and bad input."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lightning_trak.outputs import DiffusionLoss, DiffusionMean, DiffusionSquare
from tests.outputs.tasks import ALPHAS, Denoiser

STEPS, DRAWS, SEED = [0, 4, 9], 2, 3


@pytest.fixture
def module():
    torch.manual_seed(0)
    return Denoiser().double()


@pytest.fixture
def images():
    return torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def noised(images):
    """Noisy images, timesteps and noises, an image, timestep and draw at a time."""
    for step in STEPS:
        for draw in range(DRAWS):
            noise = torch.from_numpy(np.random.default_rng([SEED, step, draw]).standard_normal((1, *images.shape[1:])))
            alpha = ALPHAS.double()[step]
            yield alpha.sqrt() * images + (1 - alpha).sqrt() * noise, step, noise, alpha


def predictions(module, images):
    for noisy, step, noise, alpha in noised(images):
        yield module(noisy, torch.full((len(images),), step)), noise.expand_as(images), alpha


def mean(values):
    return torch.stack([value.flatten(1).mean(1) for value in values]).mean(0)


@pytest.mark.parametrize(
    ("kind", "measure"),
    [
        (DiffusionLoss, lambda found, noise: -((found - noise) ** 2)),
        (DiffusionSquare, lambda found, noise: found**2),
        (DiffusionMean, lambda found, noise: found),
    ],
)
def test_values_and_gradients(module, images, kind, measure):
    output = kind(ALPHAS, STEPS, draws=DRAWS, seed=SEED)
    expected = mean(measure(found, noise) for found, noise, _ in predictions(module, images))
    for batch in (images, (images,), [images]):
        torch.testing.assert_close(output.output(module, batch), expected)
    parameters = list(module.parameters())
    found = torch.autograd.grad(output.output(module, images).sum(), parameters)
    for mine, plain in zip(found, torch.autograd.grad(expected.sum(), parameters), strict=True):
        torch.testing.assert_close(mine, plain)


def test_prediction_types(module, images):
    targets = {
        "epsilon": lambda noise, alpha: noise,
        "v_prediction": lambda noise, alpha: alpha.sqrt() * noise - (1 - alpha).sqrt() * images,
        "sample": lambda noise, alpha: images,
    }
    for kind, target in targets.items():
        output = DiffusionLoss(ALPHAS, STEPS, DRAWS, SEED, prediction_type=kind)
        expected = mean(-((found - target(noise, alpha)) ** 2) for found, noise, alpha in predictions(module, images))
        torch.testing.assert_close(output.output(module, images), expected)
        assert torch.equal(output.loss(expected), -expected)


def test_noise_is_that_of_seed_timestep_and_draw_alone(module, images):
    output = DiffusionLoss(ALPHAS, STEPS, DRAWS, SEED)
    states = torch.get_rng_state(), random.getstate()
    whole = output.output(module, images)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    torch.manual_seed(7)
    for order in ([3], [2, 0], [1, 3, 2, 0]):
        torch.testing.assert_close(output.output(module, images[order]), whole[order])
    single = DiffusionLoss(ALPHAS, STEPS, DRAWS, SEED).output(module.float(), images.float())
    torch.testing.assert_close(single.double(), whole, rtol=1e-5, atol=1e-6)  # rounded, not drawn again
    parts = torch.stack([DiffusionLoss(ALPHAS, [step], DRAWS, SEED).output(module.double(), images) for step in STEPS])
    torch.testing.assert_close(parts.mean(0), whole)
    assert not torch.allclose(DiffusionLoss(ALPHAS, STEPS, DRAWS, 4).output(module, images), whole)


def test_conditions_and_results_with_a_sample(module, images):
    expected = DiffusionSquare(ALPHAS, STEPS).output(module, images)
    output = DiffusionSquare(
        ALPHAS,
        STEPS,
        denoise=lambda module, noisy, times, batch: SimpleNamespace(sample=module(noisy, times) * batch["scale"]),
        clean=lambda batch: batch["image"],
    )
    scale = torch.full((4, 1, 1, 1), 2.0)
    torch.testing.assert_close(output.output(module, {"image": images, "scale": scale}), 4 * expected)


def test_residuals_of_das_are_root_mean_square_errors(images):
    module = Denoiser().double()
    loss = DiffusionLoss(ALPHAS, STEPS).output(module, images)
    residuals = (-loss).sqrt()
    errors = [
        (module(noisy, torch.full((4,), step)) - noise).square().flatten(1).mean(1)
        for noisy, step, noise, _ in _of_seed_zero(images)
    ]
    torch.testing.assert_close(residuals, torch.stack(errors).mean(0).sqrt())


def _of_seed_zero(images):
    for step in STEPS:
        noise = torch.from_numpy(np.random.default_rng([0, step, 0]).standard_normal((1, *images.shape[1:])))
        alpha = ALPHAS.double()[step]
        yield alpha.sqrt() * images + (1 - alpha).sqrt() * noise, step, noise, alpha


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (
            (torch.randn(4, 2, 3, 3), torch.zeros(4)),
            ValueError,
            "examples alone, a Tensor, received a tuple; pass clean=",
        ),
        ({"image": torch.randn(4, 2, 3, 3)}, ValueError, "received a dict; pass clean="),
        (torch.zeros(4, 2, 3, 3, dtype=torch.uint8), TypeError, r"Tensor of floats .*received torch.uint8 of shape"),
        (torch.randn(4), TypeError, r"shape \(batch, ...\), received torch.float32 of shape \(4,\)"),
    ],
)
def test_batches_that_do_not_fit_are_refused(batch, error, message):
    with pytest.raises(error, match=message):
        DiffusionLoss(ALPHAS, STEPS).output(Denoiser(), batch)


def test_a_condition_is_not_dropped(images):
    output = DiffusionLoss(ALPHAS, STEPS, clean=lambda batch: batch[0])
    with pytest.raises(ValueError, match=r"received a list; pass denoise="):
        output.output(Denoiser().double(), [images, torch.zeros(4)])


def test_predictions_that_do_not_fit_are_refused(images):
    for denoise, error, message in (
        (lambda module, noisy, times, batch: noisy.repeat(1, 2, 1, 1), ValueError, r"\(4, 2, 3, 3\).*\(4, 4, 3, 3\)"),
        (lambda module, noisy, times, batch: {"eps": noisy}, TypeError, "received a dict; pass denoise="),
    ):
        with pytest.raises(error, match=message):
            DiffusionLoss(ALPHAS, STEPS, denoise=denoise).output(nn.Identity(), images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timesteps": []}, "timesteps from 0 to 9, at least one"),
        ({"timesteps": [10]}, r"received \[10\]"),
        ({"timesteps": [-1]}, r"received \[-1\]"),
        ({"timesteps": [1.5]}, r"received \[1.5\]"),
        ({"timesteps": [True]}, r"received \[True\]"),
        ({"timesteps": torch.tensor([0.5])}, r"received \[tensor\(0.5"),
        ({"alphas_cumprod": torch.ones(3, 3)}, r"shape \(T,\).*received shape \(3, 3\)"),
        ({"alphas_cumprod": torch.tensor([0.5, torch.nan])}, "numbers from 0 to 1, received other numbers"),
        ({"alphas_cumprod": torch.linspace(1e-4, 2, 10)}, "received other numbers"),
        ({"draws": 0}, "`draws` to be a positive integer"),
        ({"seed": -1}, "seed as an integer that is not negative"),
        ({"seed": 0.5}, "received 0.5"),
        ({"prediction_type": "noise"}, "prediction_type must be one of"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DiffusionLoss(**({"alphas_cumprod": ALPHAS, "timesteps": STEPS} | arguments))


def test_timesteps_of_any_integer_type():
    first = DiffusionLoss(ALPHAS, range(0, 10, 5))
    for steps in (np.arange(0, 10, 5), torch.arange(0, 10, 5), (0, 5)):
        assert DiffusionLoss(ALPHAS, steps).fingerprint() == first.fingerprint()
    assert DiffusionSquare(ALPHAS, [0, 5]).fingerprint() != first.fingerprint()
    assert DiffusionLoss(ALPHAS, [0, 5], seed=1).fingerprint() != first.fingerprint()
