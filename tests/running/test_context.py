"""The training examples that a model output remembers are a fair sample, and another one for each key."""

import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak.running.data.loading import sample_batches


def test_every_example_is_drawn_equally_often():
    loader = DataLoader(TensorDataset(torch.arange(10)), batch_size=3, shuffle=True)

    def sample(seed: int, checkpoint: int) -> list[int]:
        batches = sample_batches(loader, 4, f"{seed}/{checkpoint}/context")
        assert [len(batch) for batch in batches] == [3, 1]
        return [position for batch in batches for position in batch]

    draws = [sample(seed, checkpoint) for seed in range(100) for checkpoint in range(4)]
    assert all(len(set(draw)) == 4 for draw in draws)
    counts = torch.bincount(torch.tensor(draws).flatten(), minlength=10)
    expected = 400 * 4 / 10
    # Without replacement, a count has variance 400 * 0.4 * 0.6; five standard deviations.
    assert (counts - expected).abs().max() < 5 * (400 * 0.4 * 0.6) ** 0.5
    assert sample(0, 0) == draws[0]
    assert draws[0] != draws[1]
    assert sorted(position for batch in sample_batches(loader, 99, "all") for position in batch) == list(range(10))
