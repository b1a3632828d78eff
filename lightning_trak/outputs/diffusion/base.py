"""What outputs of diffusion models share: the same noise at the same timesteps for every example."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lightning_trak.checks import is_integer, positive, require_one_of
from lightning_trak.outputs.base import ModelOutput

Denoise = Callable[[nn.Module, Tensor, Tensor, Any], Any]
Clean = Callable[[Any], Tensor]
PredictionType = Literal["epsilon", "v_prediction", "sample"]


class DiffusionOutput(ModelOutput):
    r"""Base of the outputs of diffusion models: a number for each prediction, averaged over timesteps and noises.

    An example x is noised to :math:`x_t = \sqrt{\bar\alpha_t} x + \sqrt{1 - \bar\alpha_t} \epsilon` (Ho et al. 2020,
    arXiv 2006.11239, equation 4). From it and t, the model predicts the noise, the velocity
    :math:`\sqrt{\bar\alpha_t} \epsilon - \sqrt{1 - \bar\alpha_t} x`, or the example.

    The noise follows from seed, timestep, draw and the shape of an example alone: it is the same for all examples, in
    any batch and order, on any device. So outputs and scores can be repeated, and examples are compared at one noise.

    Args:
        alphas_cumprod: :math:`\bar\alpha_t` for all timesteps of training, shape ``(T,)``, such as
            ``scheduler.alphas_cumprod`` of diffusers.
        timesteps: the timesteps to average over, each from 0 to T - 1.
        draws: how many noises are drawn at each timestep.
        seed: of the noise.
        prediction_type: what the model predicts, in the words of diffusers.
        denoise: ``(module, noisy, timesteps, batch) -> prediction``, with noisy examples ``(batch, ...)`` and
            timesteps ``(batch,)``, for models that take a condition or are called in another way; the prediction is a
            tensor of the shape of ``noisy``, or has it as ``sample``. Default: ``module(noisy, timesteps)``, for
            batches that hold nothing but the examples.
        clean: ``batch -> x``, the examples of a batch. Default: the batch if it is a tensor, or its only element.
    """

    averages = True

    def __init__(
        self,
        alphas_cumprod: Tensor,
        timesteps: Sequence[int],
        draws: int = 1,
        seed: int = 0,
        prediction_type: PredictionType = "epsilon",
        denoise: Denoise | None = None,
        clean: Clean | None = None,
    ) -> None:
        alphas = torch.as_tensor(alphas_cumprod).detach().double().cpu()
        if alphas.ndim != 1 or not len(alphas) or not bool(((alphas >= 0) & (alphas <= 1)).all()):
            raise ValueError(
                "expected alphas_cumprod of shape (T,), numbers from 0 to 1, received"
                f" {'other numbers' if alphas.ndim == 1 and len(alphas) else f'shape {tuple(alphas.shape)}'}"
            )
        steps = list(timesteps)
        if not steps or not all(is_integer(step) and 0 <= step < len(alphas) for step in steps):
            raise ValueError(f"expected timesteps from 0 to {len(alphas) - 1}, at least one, received {steps}")
        if not is_integer(seed) or seed < 0:
            raise ValueError(f"expected seed as an integer that is not negative, received {seed!r}")
        require_one_of("prediction_type", prediction_type, ("epsilon", "v_prediction", "sample"))
        self.timesteps = [int(step) for step in steps]
        self.signals = [float(alphas[step].sqrt()) for step in self.timesteps]
        self.noises = [float((1 - alphas[step]).sqrt()) for step in self.timesteps]
        self.draws = positive("draws", draws)
        self.seed = int(seed)
        self.prediction_type = prediction_type
        self.denoise = denoise
        self.clean = clean

    @abstractmethod
    def measure(self, prediction: Tensor, target: Tensor) -> Tensor:
        """A number for each example at one timestep and noise.

        Args:
            prediction: what the model predicted, shape ``(batch, elements)``, in float32 or better.
            target: what it should have predicted, of the same shape.

        Returns:
            Shape ``(batch,)``.
        """

    def output(self, module: nn.Module, batch: Any) -> Tensor:
        """The mean of :meth:`measure` over timesteps and draws, shape ``(batch,)``.

        Raises:
            ValueError: if the batch holds more than the examples and ``denoise`` or ``clean`` is not given, or the
                prediction has another shape than the examples.
            TypeError: if the examples are not a tensor of floats, or the prediction is not a tensor.
        """
        values = [self.measure(*pair) for pair in self._predictions(module, batch)]
        return torch.stack(values).mean(0)

    def _predictions(self, module: nn.Module, batch: Any) -> Iterator[tuple[Tensor, Tensor]]:
        clean = self._clean(batch)
        for step, signal, scale in zip(self.timesteps, self.signals, self.noises, strict=True):
            times = torch.full((len(clean),), step, dtype=torch.long, device=clean.device)
            for draw in range(self.draws):
                noise = _noise([self.seed, step, draw], clean)
                noisy = signal * clean + scale * noise
                target = {
                    "epsilon": noise.expand_as(clean),
                    "v_prediction": signal * noise - scale * clean,
                    "sample": clean,
                }[self.prediction_type]
                found = self._denoised(module, noisy, times, batch)
                dtype = torch.promote_types(found.dtype, torch.float32)
                yield found.to(dtype).flatten(1), target.to(dtype).flatten(1)

    def _denoised(self, module: nn.Module, noisy: Tensor, times: Tensor, batch: Any) -> Tensor:
        result = module(noisy, times) if self.denoise is None else self.denoise(module, noisy, times, batch)
        found = getattr(result, "sample", result) if not isinstance(result, Tensor) else result
        if not isinstance(found, Tensor):
            raise TypeError(
                f"expected the prediction as a Tensor, or as `sample` of the result, received a"
                f" {type(result).__name__}; pass denoise=, a function of (module, noisy, timesteps, batch)"
            )
        if found.shape != noisy.shape:
            raise ValueError(
                f"expected a prediction of the shape {tuple(noisy.shape)} of the noisy examples, received"
                f" {tuple(found.shape)}; pass denoise= to select it"
            )
        return found

    def _clean(self, batch: Any) -> Tensor:
        alone = batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 1 else batch
        advice = {
            "clean": "clean=, a function of the batch that returns the examples",
            "denoise": "denoise=, which says what the model takes beside them: for nothing else, lambda module, noisy,"
            " timesteps, batch: module(noisy, timesteps)",
        }
        missing = [text for name, text in advice.items() if getattr(self, name) is None]
        if missing and not isinstance(alone, Tensor):
            raise ValueError(
                f"expected a batch that holds the examples alone, a Tensor, received a {type(batch).__name__}; pass"
                f" {', and '.join(missing)}"
            )
        clean = alone if self.clean is None else self.clean(batch)
        if not isinstance(clean, Tensor) or clean.ndim < 2 or not clean.is_floating_point():
            received = f"{clean.dtype} of shape {tuple(clean.shape)}" if isinstance(clean, Tensor) else type(clean)
            raise TypeError(f"expected the examples as a Tensor of floats of shape (batch, ...), received {received}")
        return clean


def _noise(seeds: list[int], like: Tensor) -> Tensor:
    """Standard normal noise for one example, shape ``(1, ...)``, from the seeds alone.

    NumPy draws it: torch's generators differ between devices, and ``vmap`` refuses them.
    """
    drawn = np.random.default_rng(seeds).standard_normal((1, *like.shape[1:]))
    return torch.from_numpy(drawn).to(device=like.device, dtype=like.dtype)
