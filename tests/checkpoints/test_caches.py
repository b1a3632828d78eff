"""Modules that keep what they made of their weights: each checkpoint makes it anew."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_trak import TRAK
from lightning_trak.methods import RepresentationSimilarity
from lightning_trak.projections import IdentityProjection
from tests.lit import TARGETS, TRAIN, LitNet, make_checkpoints, make_model, make_trainer

WEIGHTS = make_checkpoints(2)


class KeepsInEval(LitNet):
    """Keeps what it made of a weight as long as it is in eval mode, as LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> KeepsInEval:
        if mode:
            self.cache = {}
        return super().train(mode)

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training or "weight" not in self.cache:
            self.cache["weight"] = self.first.weight * 1
        hidden = nn.functional.linear(inputs, self.cache["weight"], self.first.bias)
        return self.head(torch.tanh(self.norm(hidden))) * self.scale


def test_what_was_made_of_other_weights_in_eval_mode_is_made_anew(tmp_path: Path) -> None:
    plain, used = make_model(), KeepsInEval().eval()
    used.load_state_dict(plain.state_dict())
    with torch.no_grad():
        used(TRAIN.tensors[0])
    found, expected = (
        TRAK(model, WEIGHTS, tmp_path / type(model).__name__, projection=IdentityProjection()).attribute(
            make_trainer(), TRAIN, TARGETS
        )
        for model in (used, plain)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    similarities = (RepresentationSimilarity(model, WEIGHTS, layer="head") for model in (used, plain))
    one, two = (method.attribute(make_trainer(), TRAIN, TARGETS) for method in similarities)
    torch.testing.assert_close(one, two)
