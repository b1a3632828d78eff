"""The blocked hash of SparseProjection: which feature and sign each element has, and what this does on average."""

import math

import pytest
import torch
from scipy import stats

from lightning_trak.projections import SparseProjection
from lightning_trak.projections.philox import Stream
from tests.projections.test_projections import CPU, bind, matrix, project, random_gradients

SUMS = "lightning_trak.projections.sparse._SUMS"


@pytest.mark.parametrize(("dim", "least"), [(10, 1), (10, 25), (7, 7)])
def test_entries_follow_from_the_words(dim, least, monkeypatch):
    """In plain Python: block, cyclic shift, part, cyclic shift."""
    monkeypatch.setattr(SUMS, least)
    rows = matrix(bind(SparseProjection(dim), {"a": 300}), "a")
    words = Stream.derive("SparseProjection", 0, 0, "a").words(torch.arange(300), 2).tolist()
    sums = dim * math.ceil(least / dim)
    for element in range(300):
        block, place = divmod(element, sums)
        part, place = divmod((place + (words[block][1][0] * sums >> 32)) % sums, dim)
        feature = (place + (words[part][1][1] * dim >> 32)) % dim if sums > dim else place
        bit = words[element // 128][0][element % 128 // 32] >> element % 32 & 1
        expected = torch.zeros(dim, dtype=torch.float64)
        expected[feature] = 1 - 2 * bit
        assert torch.equal(rows[element], expected)


def test_features_and_signs_are_uniform(monkeypatch):
    monkeypatch.setattr(SUMS, 64)
    drawn = torch.stack([matrix(bind(SparseProjection(16), {"w": 150}, seed), "w") for seed in range(400)])
    for element in (0, 70, 149):
        assert stats.chisquare(drawn[:, element].abs().sum(0)).pvalue > 1e-3
    signs = drawn.sum(2)
    assert stats.kstest(signs.mean(0).numpy() * 20, "norm").pvalue > 1e-3  # of each element, over seeds
    assert abs((signs[:, 1:] * signs[:, :-1]).mean()) < 4 / math.sqrt(signs.numel())


def collisions(sizes, dim, sums):
    """The probability p_ij that two elements have the same feature, as the docstring of SparseProjection derives it."""
    n = sum(sizes.values())
    parameter = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(list(sizes.values())))
    element = torch.cat([torch.arange(size) for size in sizes.values()])
    together = (parameter == parameter[:, None]) & (element // sums == element[:, None] // sums)
    gap = (element - element[:, None]).abs()
    same_part = (dim - torch.minimum(gap, sums - gap)).clamp(min=0) / dim
    probability = torch.where(together, (1 - same_part) / dim, 1 / dim).double()
    return probability - torch.diag(torch.ones(n) * probability.diagonal())


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "least"), [(16, 1), (16, 48), (64, 8192), (100, 8192)])
def test_inner_products_are_unbiased_with_the_variance_of_the_docstring(dim, least, monkeypatch):
    """For x, y over two parameters, with <x, y> and the closed form of the variance clearly apart from zero."""
    monkeypatch.setattr(SUMS, least)
    sizes, trials = {"a": 50, "b": 70}, 800
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(120, generator=generator, dtype=torch.float64)
    y = 0.6 * x + torch.randn(120, generator=generator, dtype=torch.float64)
    parts = dict(zip(sizes, torch.stack((x, y)).split([50, 70], dim=1), strict=True))
    products = torch.empty(trials, dtype=torch.float64)
    for seed in range(trials):
        features = project(bind(SparseProjection(dim), sizes, seed), parts, torch.float64)
        products[seed] = features[0] @ features[1]
    pairs = (torch.outer(x, y) + torch.outer(y, x)) ** 2
    sums = dim * math.ceil(least / dim)
    variance = (pairs * collisions(sizes, dim, sums)).sum() / 2
    independent = ((x @ x) * (y @ y) + (x @ y) ** 2 - 2 * (x**2 * y**2).sum()) / dim
    assert variance <= independent
    assert abs(products.mean() - x @ y) < 4 * (variance / trials).sqrt()
    squares = (products - x @ y) ** 2
    assert abs(squares.mean() - variance) < 4 * squares.std() / math.sqrt(trials)
    assert squares.std() / math.sqrt(trials) < 0.15 * variance  # the line above can fail


def test_a_parameter_with_fewer_elements_than_features_has_no_collisions():
    bound = bind(SparseProjection(8192), {"w": 8000, "v": 500})
    gradients = torch.randn(3, 8000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features = project(bound, {"w": gradients}, torch.float64)
    torch.testing.assert_close(features @ features.T, gradients @ gradients.T)


def test_models_with_few_parameters_keep_whole_gradients():
    gradients = random_gradients(3, {"w": 60, "v": 40})
    bound = bind(SparseProjection(100), {"w": 60, "v": 40})
    assert bound.dim == 100
    assert torch.equal(project(bound, gradients), torch.cat(list(gradients.values()), dim=1))
    assert bind(SparseProjection(99), {"w": 60, "v": 40}).dim == 99
    assert bind(SparseProjection(101), {"w": 60, "v": 40}).dim == 100


@pytest.mark.parametrize("dim", [32, 8192])
@pytest.mark.parametrize("size", [5000, 50_000])
def test_features_are_bit_identical_in_any_batch_and_with_any_number_of_threads(dim, size):
    bound = bind(SparseProjection(dim), {"w": size})
    gradients = random_gradients(16, {"w": size})
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(project(bound, gradients))
    finally:
        torch.set_num_threads(threads)
    results.append(torch.cat([project(bound, {"w": part}) for part in gradients["w"].split([1, 4, 11])]))
    assert all(torch.equal(result, results[0]) for result in results)


def test_signs_that_are_kept_are_used_for_the_same_elements_alone():
    """Other parameters, rows, numbers of elements and dtypes come in between."""
    shapes, projection = {"v": (40, 500), "w": (40, 500)}, SparseProjection(8192)
    calls = [
        ("v", None, torch.float32),
        ("w", None, torch.float32),
        ("w", None, torch.float64),
        ("w", range(20), torch.float32),
        ("w", range(10, 30), torch.float32),
        ("w", range(10, 31), torch.float32),
        ("w", None, torch.float32),
        ("v", None, torch.float32),
    ]
    bound = projection.bind(shapes, 0, 0, CPU)
    for name, rows, dtype in calls:
        gradients = torch.randn(2, 500 * (40 if rows is None else len(rows)))
        found, expected = torch.zeros(2, 2, 8192, dtype=dtype)
        bound.add_(found, name, gradients, rows)
        projection.bind(shapes, 0, 0, CPU).add_(expected, name, gradients, rows)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("least", [1, 50])
@pytest.mark.parametrize("columns", [5, 128, 300])
def test_a_gradient_of_few_rows(least, columns, monkeypatch):
    monkeypatch.setattr(SUMS, least)
    bound = SparseProjection(12).bind({"a": (30, columns)}, 0, 0, CPU)
    rows = torch.randn(2, 4, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    numbers = torch.tensor([[3, 0, 3, 29], [7, 7, 7, 1]])  # some occur several times
    dense = torch.zeros(2, 30, columns, dtype=torch.float64)
    for example, number, row in zip((0, 1), numbers, rows, strict=True):
        dense[example].index_add_(0, number, row)
    features = torch.ones(2, 12, dtype=torch.float64)
    bound.add_sparse_(features, "a", rows, numbers)
    torch.testing.assert_close(features, project(bound, {"a": dense.flatten(1)}, torch.float64) + 1)


@pytest.mark.parametrize("dim", [12, 60])
def test_gradients_of_several_parameters_side_by_side(dim, monkeypatch):
    monkeypatch.setattr(SUMS, 50)  # more sums than features, or as many
    sizes = {"a": 30, "b": 7, "c": 40}
    bound = bind(SparseProjection(dim), sizes)
    gradients = random_gradients(3, sizes)
    names = ["c", "a", "c"]
    found = torch.ones(3, dim)
    bound.add_joined_(found, names, [gradients[name] for name in names])
    expected = torch.ones(3, dim)
    for name in names:
        bound.add_(expected, name, gradients[name])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("folded", [1, 1 << 20])
def test_kernels_are_numbered_with_their_channels_last(folded, monkeypatch):
    """With folds and without: like a matrix in this order, whatever the order in memory, in parts and side by side."""
    monkeypatch.setattr(SUMS, 16)
    monkeypatch.setattr("lightning_trak.projections.sparse._FOLDED", folded)
    bound = SparseProjection(12).bind({"w": (4, 12, 2, 5)}, 0, 0, CPU)
    assert bool(bound.folds) == (folded == 1)
    gradients = random_gradients(3, {"w": 480}, torch.float64)["w"].view(3, 4, 12, 2, 5)
    ordered = gradients.movedim(2, -1)
    expected, *ways = torch.zeros(5, 3, 12, dtype=torch.float64)
    SparseProjection(12).bind({"w": (4, 120)}, 0, 0, CPU).add_(expected, "w", ordered.flatten(1))
    bound.add_(ways[0], "w", gradients.flatten(1))
    bound.add_(ways[1], "w", ordered.contiguous().movedim(-1, 2))
    for rows in (range(1), range(1, 4)):
        bound.add_(ways[2], "w", gradients[:, rows.start : rows.stop], rows)
    assert bound.flattened("w", ordered.contiguous().movedim(-1, 2)).is_contiguous()
    if not bound.folds:
        bound.add_joined_(ways[3], ["w"], [bound.flattened("w", gradients)])
    for found in ways[: 3 if bound.folds else 4]:
        torch.testing.assert_close(found, expected)
