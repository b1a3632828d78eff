"""Large matrices are folded: which sum and sign each element has, what this does on average, and all ways to sums."""

import math

import pytest
import torch

from lightning_trak.projections import SparseProjection, sparse
from lightning_trak.projections.fold import Fold
from lightning_trak.projections.philox import Stream
from tests.projections.test_projections import CPU

# Rows, columns and slices: the last slice is whole, or has zeros; as many slices as rows.
SHAPES = [(37, 96, 3), (37, 100, 3), (5, 300, 5), (64, 33, 2)]


def make_fold(rows, columns, slices, seed=0):
    streams = (Stream.derive(side, seed, 0, "w") for side in ("rows", "columns"))
    return Fold(rows, columns, slices, *streams, CPU)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def folded(some, matrices):
    sums = torch.zeros(len(matrices), *some.shape, dtype=matrices.dtype)
    some.add_(sums, matrices)
    return sums


@pytest.fixture
def small_folds(monkeypatch):
    """Folds of matrices that are small enough for tests."""
    monkeypatch.setattr(sparse, "_SUMS", 16)
    monkeypatch.setattr(sparse, "_FOLDED", 4)


@pytest.mark.parametrize(("rows", "columns", "slices"), SHAPES)
def test_entries_follow_from_the_words(rows, columns, slices):
    """In plain Python: signs of row and column, and the shifts of the slice."""
    streams = [Stream.derive(side, 0, 0, "w") for side in ("rows", "columns")]
    words = [stream.words(torch.arange(max(rows, columns)), 2).tolist() for stream in streams]
    some = make_fold(rows, columns, slices)
    width = some.shape[1]
    assert width == math.ceil(columns / slices / 16) * 16
    order = sorted(range(rows), key=lambda row: words[0][row][1][0])

    def sign(side, index):
        return 1 - 2 * (words[side][index // 128][0][index % 128 // 32] >> index % 32 & 1)

    found = folded(some, torch.eye(rows * columns, dtype=torch.float64).view(-1, rows, columns))
    for element in range(0, rows * columns, 7):
        row, (index, column) = element // columns, divmod(element % columns, width)
        place = (column + (words[1][index][1][0] * width >> 32)) % width
        expected = torch.zeros(rows, width, dtype=torch.float64)
        expected[(row + order[index]) % rows, place] = sign(0, row) * sign(1, element % columns)
        assert torch.equal(found[element], expected)


@pytest.mark.parametrize("positions", [1, 3, 60])
@pytest.mark.parametrize(("rows", "columns", "slices"), SHAPES)
def test_factors_give_the_sums_of_their_product(rows, columns, slices, positions):
    """Few positions, where no slice of the matrix is formed, and many."""
    some = make_fold(rows, columns, slices)
    left, right = random(3, positions, rows), random(3, positions, columns, seed=1)
    expected = folded(some, left.mT @ right)
    torch.testing.assert_close(some.of_factors(left, right), expected)
    strided = [factor.mT.contiguous().mT for factor in (left, right)]
    torch.testing.assert_close(some.of_factors(*strided), expected)


@pytest.mark.parametrize(("rows", "columns", "slices"), SHAPES)
def test_rows_give_the_sums_of_their_matrix(rows, columns, slices):
    some, matrices = make_fold(rows, columns, slices), random(2, rows, columns)
    expected, found = folded(some, matrices), torch.zeros(2, *some.shape, dtype=torch.float64)
    some.add_(found, matrices[:, 3:], 3)
    some.add_(found, matrices[:, :3])
    torch.testing.assert_close(found, expected)

    numbers = torch.tensor([[3, 0, 3], [4, 4, 1]])
    few = random(2, 3, columns)
    dense = torch.zeros(2, rows, columns, dtype=torch.float64)
    found = torch.zeros_like(expected)
    for example in range(2):
        dense[example].index_add_(0, numbers[example], few[example])
    for sums, part, places in zip(found, *some.of_rows(few, numbers), strict=True):
        sums.index_add_(0, places, part)
    torch.testing.assert_close(found, folded(some, dense))


def test_bfloat16_is_added_up_in_float32():
    some = make_fold(64, 400, 3)
    left, right = (random(2, 60, size).bfloat16() for size in (64, 400))
    exact = folded(some, left.double().mT @ right.double())
    error = (some.of_factors(left, right).double() - exact).norm() / exact.norm()
    once = ((left.mT @ right).double() - left.double().mT @ right.double()).norm() / exact.norm()
    assert error < 1.2 * once  # the products are rounded, and nothing else


@pytest.mark.usefixtures("small_folds")
def test_only_large_matrices_are_folded():
    shapes = {"large": (40, 300), "small": (3, 100), "narrow": (500, 40), "vector": (4000,), "number": ()}
    bound = SparseProjection(48).bind(shapes, 0, 0, CPU)
    assert list(bound.folds) == ["large"]
    assert bound.folds["large"].size >= 4 * 48
    for rows in (1, 2, 3):  # there are no more slices than rows
        many = SparseProjection(48).bind({"w": (rows, 4000)}, 0, 0, CPU).folds
        assert rows == 1 or many["w"].shape == (rows, math.ceil(4000 / rows / 16) * 16)


@pytest.mark.usefixtures("small_folds")
def test_features_of_all_ways_are_the_same():
    bound = SparseProjection(48).bind({"w": (40, 300)}, 0, 0, CPU)
    left, right = random(3, 2, 40), random(3, 2, 300, seed=1)
    gradients = (left.mT @ right).flatten(1)
    whole, parts, product, few = torch.ones(4, 3, 48, dtype=torch.float64)
    bound.add_(whole, "w", gradients)
    for rows in (range(11), range(11, 40)):
        bound.add_(parts, "w", gradients[:, rows.start * 300 : rows.stop * 300], rows)
    bound.add_folded_(product, "w", bound.folds["w"].of_factors(left, right))
    bound.add_sparse_(few, "w", gradients.view(3, 40, 300), torch.arange(40).expand(3, -1))
    for features in (parts, product, few):
        torch.testing.assert_close(features, whole)


@pytest.mark.usefixtures("small_folds")
def test_bits_do_not_depend_on_the_batch_or_on_threads():
    bound = SparseProjection(48).bind({"w": (40, 300)}, 0, 0, CPU)
    gradients, threads, found = random(16, 40 * 300).float(), torch.get_num_threads(), []
    try:
        for number, sizes in ((1, [16]), (2, [16]), (3, [1, 4, 11])):
            torch.set_num_threads(number)
            features = torch.zeros(16, 48)
            for some, part in zip(features.split(sizes), gradients.split(sizes), strict=True):
                bound.add_(some, "w", part)
            found.append(features)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(features, found[0]) for features in found)


@pytest.mark.slow
@pytest.mark.usefixtures("small_folds")
def test_inner_products_are_unbiased_with_the_variance_of_free_elements():
    """Also of outer products of positive numbers, whose elements would add up if pairs of them shared their signs."""
    trials, dim, generator = 1000, 48, torch.Generator().manual_seed(0)
    positive = [
        torch.outer(*(torch.rand(size, generator=generator, dtype=torch.float64) for size in (41, 150)))
        for _ in range(2)
    ]
    gradients = torch.stack([*positive, random(41, 150)]).flatten(1)
    products = torch.empty(trials, 3, 3, dtype=torch.float64)
    for seed in range(trials):
        features = torch.zeros(3, dim, dtype=torch.float64)
        bound = SparseProjection(dim).bind({"w": (41, 150)}, seed, 0, CPU)
        bound.add_(features, "w", gradients)
        products[seed] = features @ features.T
    assert bound.folds["w"].shape == (41, 64)
    exact, squares = gradients @ gradients.T, gradients.square()
    variance = (exact.diag().outer(exact.diag()) + exact**2 - 2 * squares @ squares.T) / dim
    errors = products - exact
    assert (errors.mean(0).abs() < 4 * (variance / trials).sqrt()).all()
    spread = errors.square().std(0) / math.sqrt(trials)
    assert ((errors.square().mean(0) - variance).abs() < 4 * spread).all()
    assert (spread < 0.07 * variance).all()  # the line above can fail
