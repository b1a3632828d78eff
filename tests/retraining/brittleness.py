"""Outputs of models trained without proponents, of two methods of which one is good."""

import torch

from lightning_trak.retraining import Brittleness


def make_brittleness(num_targets=40, num_seeds=3):
    generator = torch.Generator().manual_seed(0)
    references = 1 + torch.randn(num_targets, 1, 1, generator=generator)
    references = references + 0.3 * torch.randn(num_targets, 4, num_seeds, generator=generator)
    fall = torch.tensor([[0.5, 2.0], [0.0, 0.1]])[..., None, None]
    noise = 0.3 * torch.randn(2, 2, num_targets, num_seeds, generator=generator)
    return Brittleness(("good", "bad"), (5, 50), references.mean((1, 2))[:, None] - fall + noise, references)
