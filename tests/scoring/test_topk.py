"""The best scores of each target where several are equal: no result depends on blocks or ranks."""

import pytest
import torch

from lightning_trak.running.ranks import Ranks
from lightning_trak.scoring import topk
from lightning_trak.scoring.topk import Best, TopK, best_of, block_top_k, merge_top_k


@pytest.fixture
def scores():
    """Few different numbers, in random order."""
    return torch.randint(0, 5, (6, 200), generator=torch.Generator().manual_seed(0)).float()


def in_order(scores, k, largest):
    """By score and then by position."""
    best = scores.sort(dim=1, descending=largest, stable=True)
    return TopK(best.values[:, :k], best.indices[:, :k])


def equal(found, expected):
    return torch.equal(found.values, expected.values) and torch.equal(found.indices, expected.indices)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("k", [1, 7, 60, 200])
@pytest.mark.parametrize("width", [10, 64, 200])
def test_of_equal_scores_the_first_are_best(scores, largest, k, width):
    best = Best(k, largest)
    for start in range(0, 200, width):
        best.add(scores[:, start : start + width], start)
    assert equal(best.merged(Ranks(), scores), in_order(scores, k, largest))


def test_the_shards_of_a_rank_may_lie_between_those_of_others(scores):
    parts = [Best(7, True), Best(7, True)]
    for number, start in enumerate(range(0, 200, 20)):
        parts[number % 2].add(scores[:, start : start + 20], start)
    found = merge_top_k([part.merged(Ranks(), scores) for part in parts], 7, True)
    assert equal(found, in_order(scores, 7, True))


def test_constant_scores_keep_their_order():
    constant = torch.zeros(2, 100)
    assert block_top_k(constant, 40, 3, True).indices.tolist() == [[40, 41, 42]] * 2
    ends = best_of(constant, 3, None, left_out=torch.arange(100) < 2)
    assert ends.proponents.indices.tolist() == ends.opponents.indices.tolist() == [[2, 3, 4]] * 2
    assert best_of(constant, 0, True).indices.shape == (2, 0)


def test_a_score_that_is_no_number_is_found_in_any_block(scores):
    scores[3, 150] = torch.nan
    blocks, whole = Best(3, True), Best(3, True)
    whole.add(scores, 0)
    for start in range(0, 200, 50):
        blocks.add(scores[:, start : start + 50], start)
    assert blocks.merged(Ranks(), scores).indices[3, 0] == 150
    assert torch.equal(blocks.merged(Ranks(), scores).indices, whole.merged(Ranks(), scores).indices)


@pytest.mark.parametrize("sign", [1, -1])
def test_top_k_sorts_only_rows_with_a_better_score(sign, monkeypatch):
    sorted_rows = []

    def counting(scores, *options):
        sorted_rows.append(len(scores))
        return block_top_k(scores, *options)

    monkeypatch.setattr(topk, "block_top_k", counting)
    best = Best(2, largest=sign > 0)
    for start, block in enumerate([[[5.0, 1, 4], [1, 1, 2]], [[3, 0, 4], [1, 0, 3]], [[0, 0, 0], [1, 1, 1]]]):
        best.add(sign * torch.tensor(block), 3 * start)
    found = best.merged(Ranks(), torch.zeros(2, 1))
    assert (sign * found.values).tolist() == [[5, 4], [3, 2]]
    assert found.indices.tolist() == [[0, 2], [5, 2]]
    assert sorted_rows == [2, 1, 0]


def test_merging_keeps_global_positions():
    parts = [block_top_k(torch.tensor([[1.0, 5.0]]), 0, 1, True), block_top_k(torch.tensor([[4.0, 9.0]]), 2, 2, True)]
    merged = merge_top_k(parts, 2, True)
    assert isinstance(merged, TopK)
    assert merged.indices.tolist() == [[3, 1]]
    assert merged.values.tolist() == [[9.0, 5.0]]
