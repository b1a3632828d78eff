"""Padding that leaves an output almost as it is, and changes its gradient."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_trak import GradientDot
from lightning_trak.outputs import ClassificationMargin
from tests.lit import make_trainer

TEXTS = [(torch.arange(1, 2 + i % 5), i % 3) for i in range(10)]


class Leaking(nn.Module):
    """Masks padding, but for a share of the gradient."""

    def __init__(self):
        super().__init__()
        self.tokens, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, ids):
        hidden = torch.tanh(self.tokens(ids))
        leak = (hidden - hidden.detach()) * (ids == 0).unsqueeze(-1)  # zero, with a gradient
        return self.head((hidden * (ids > 0).unsqueeze(-1)).sum(1) + 0.03 * leak.sum(1))


def padded(items):
    ids = nn.utils.rnn.pad_sequence([ids for ids, _ in items], batch_first=True)
    return ids, torch.tensor([label for _, label in items])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_it_is_refused_and_told_apart_from_kinks(tmp_path, engine, dtype):
    torch.manual_seed(0)
    module = Leaking().to(dtype)
    method = GradientDot(
        module, [module.state_dict()], tmp_path, output=ClassificationMargin(), engine=engine, audit=len(TEXTS)
    )
    with pytest.raises(ValueError, match=r"example \d at .*its gradient is not the same alone.*padding that is not"):
        method.featurize(make_trainer(), DataLoader(TEXTS, batch_size=5, collate_fn=padded))
