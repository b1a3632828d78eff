"""The training examples that a model output remembers are a fair sample, and another one at each checkpoint."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak.predict import ExtractorModule
from lightning_trak.store import FeatureStore


def sample(seed: int, checkpoint: int, store: FeatureStore, loader: DataLoader) -> list[int]:
    extractor = SimpleNamespace(module=nn.Linear(1, 1), seed=seed, output=SimpleNamespace(context_size=4))
    module = ExtractorModule(extractor, store, train_loader=loader)
    return [int(value) for (batch,), _ in module._sample(checkpoint, "context", 4) for value in batch]


def test_every_example_is_drawn_equally_often(tmp_path):
    store = FeatureStore(tmp_path, {"checkpoints": ["a"]}, 10)
    loader = DataLoader(TensorDataset(torch.arange(10)), batch_size=3, shuffle=True)
    draws = [sample(seed, checkpoint, store, loader) for seed in range(100) for checkpoint in range(4)]
    assert all(len(set(draw)) == 4 for draw in draws)
    counts = torch.bincount(torch.tensor(draws).flatten(), minlength=10)
    expected = 400 * 4 / 10
    # Without replacement, a count has variance 400 * 0.4 * 0.6; five standard deviations.
    assert (counts - expected).abs().max() < 5 * (400 * 0.4 * 0.6) ** 0.5
    assert sample(0, 0, store, loader) == draws[0]
    assert draws[0] != draws[1]
