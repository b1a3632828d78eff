"""Rows as integers: near what they were, the same bits in every batch, and right for rows that are hard."""

import math

import pytest
import torch

from lightning_trak.projections.quantization import LEVELS, Int4, Int8

INT8, INT4 = Int8(), Int4()
BOTH = pytest.mark.parametrize("quantizer", [INT8, INT4], ids=["int8", "int4"])


def gaussian(n, k, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def heavy_tailed(n, k, seed=0):
    """Products of normal numbers, half of them zero."""
    rows = gaussian(n, k, seed) ** 3
    return rows * (gaussian(n, k, seed + 1) > 0)


def there_and_back(quantizer, rows):
    return quantizer.dequantize(quantizer.quantize(rows), rows.shape[1])


def error(quantizer, rows):
    return float((there_and_back(quantizer, rows) - rows).norm() / rows.norm())


@pytest.mark.parametrize(
    ("quantizer", "rows", "bound"),
    [
        (INT8, gaussian(20, 2048), 0.01),  # the step is about 3.5 sigma / 127
        (INT8, heavy_tailed(20, 2048), 0.05),
        (INT4, gaussian(20, 2048), 0.115),
        (INT4, heavy_tailed(20, 2048), 0.2),
    ],
)
def test_the_error_is_small(quantizer, rows, bound):
    assert bound / 4 < error(quantizer, rows) < bound


def test_four_bits_lose_less_than_a_uniform_grid():
    rows = heavy_tailed(20, 2048)
    best = torch.full((20,), torch.inf)
    for shrink in torch.linspace(0.05, 1, 40):  # each row clipped where it has the least squared error
        step = rows.abs().amax(1, keepdim=True) * shrink / 7
        best = torch.minimum(best, ((rows / step).round().clamp(-8, 7) * step - rows).norm(dim=1))
    assert error(INT4, rows) < 0.9 * float((best / rows.norm(dim=1)).mean())


def test_the_levels_are_those_of_least_squared_error():
    x = torch.linspace(-80, 80, 160_001, dtype=torch.float64)
    density = torch.exp(-(x.abs() ** 0.8))
    levels = torch.tensor(LEVELS, dtype=torch.float64) / 8
    for _ in range(400):  # Lloyd's algorithm: levels move to the mean of what is nearest to them
        nearest = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)
        mass = torch.zeros(16, dtype=torch.float64).index_add_(0, nearest, density)
        moment = torch.zeros(16, dtype=torch.float64).index_add_(0, nearest, density * x)
        outermost = (moment[15] - moment[0]) / (mass[15] + mass[0])
        levels = moment / mass
        levels[0], levels[7], levels[15] = -outermost, 0, outermost
    assert (levels / levels[15] * 127).round().int().tolist() == list(LEVELS)


@pytest.mark.parametrize("k", [1, 2, 7, 300])
@BOTH
def test_each_number_is_rounded_to_the_nearest(quantizer, k):
    rows = gaussian(6, k)
    codes, scales = quantizer.quantize(rows)
    grid = (torch.arange(-127, 128) if quantizer is INT8 else torch.tensor(LEVELS) / 127) * scales.unsqueeze(1)
    nearest = (rows.unsqueeze(2) - grid.unsqueeze(1)).abs().amin(2)
    found = (there_and_back(quantizer, rows) - rows).abs()
    torch.testing.assert_close(found, nearest, rtol=1e-4, atol=1e-6)
    assert codes.shape == (6, quantizer.columns(k))
    assert (codes.dtype, scales.dtype, scales.shape) == (quantizer.codes_dtype, torch.float32, (6,))


@pytest.mark.parametrize("k", [1, 5, 64, 1001])
@BOTH
def test_a_row_has_the_same_bits_in_every_batch(quantizer, k):
    rows = torch.cat([gaussian(40, k), heavy_tailed(40, k)])
    whole = quantizer.quantize(rows)
    for step in (1, 7, 33):
        for part, expected in zip(zip(*map(quantizer.quantize, rows.split(step)), strict=True), whole, strict=True):
            assert torch.equal(torch.cat(part), expected)
    mirrored = quantizer.quantize(rows.flip(0))
    assert all(torch.equal(found.flip(0), expected) for found, expected in zip(mirrored, whole, strict=True))


def test_rows_of_many_bytes_are_the_same_as_alone():
    rows = gaussian(9, 1 << 19)  # two at a time
    for quantizer in (INT8, INT4):
        assert torch.equal(quantizer.quantize(rows).codes[8:], quantizer.quantize(rows[8:]).codes)


@BOTH
def test_rows_of_zeros_are_kept(quantizer):
    rows = gaussian(3, 9)
    rows[1] = 0
    found = there_and_back(quantizer, rows)
    assert not found[1].any()
    assert found[0].any()
    assert found[2].any()


@pytest.mark.parametrize("value", [1.0, -1.0, 3e38, -3.4e38, 1e-38, -1e-40, 2.0**-149, -7 * 2.0**-149])
@BOTH
def test_one_number_of_any_size(quantizer, value):
    rows = torch.zeros(2, 5)
    rows[0, 3] = value
    found = there_and_back(quantizer, rows)
    torch.testing.assert_close(found, rows, rtol=0.01, atol=0)
    torch.testing.assert_close(there_and_back(quantizer, rows[:1, 3:4]), rows[:1, 3:4], rtol=0.01, atol=0)


@pytest.mark.parametrize("size", [1e-44, 1e-42, 1e-39, 1e-30, 1e30, 5e37])
@BOTH
def test_the_size_of_a_row_makes_no_difference(quantizer, size):
    rows = gaussian(4, 501) * size
    unit = 2.0**-149  # of subnormal numbers, to which results are rounded
    wrong = (there_and_back(quantizer, rows).double() - rows.double()).norm(dim=1)
    assert (wrong < (0.012 if quantizer is INT8 else 0.125) * rows.double().norm(dim=1) + unit * 501**0.5).all()


@BOTH
def test_one_huge_number_does_not_make_the_rest_worse_than_zero(quantizer):
    rows = gaussian(3, 400)
    rows[:, 7] = 1e6
    assert float((there_and_back(quantizer, rows) - rows).norm(dim=1).max()) < 1.01 * math.sqrt(400) + 30
    torch.testing.assert_close(there_and_back(quantizer, rows)[:, 7], rows[:, 7], rtol=1e-4, atol=0)


@BOTH
def test_equal_sizes_are_kept(quantizer):
    rows = gaussian(3, 50).sign() * torch.tensor([[0.1], [3.0], [1e20]])
    torch.testing.assert_close(there_and_back(quantizer, rows), rows, rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@BOTH
def test_what_is_not_finite_is_refused(quantizer, value):
    rows = gaussian(3, 9)
    rows[1, 4] = value
    with pytest.raises(ValueError, match="only finite numbers can be quantized"):
        quantizer.quantize(rows)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@BOTH
@pytest.mark.parametrize("k", [1, 7, 5000])
def test_a_row_has_the_same_bits_on_a_gpu(quantizer, k):
    rows = torch.cat([gaussian(300, k), heavy_tailed(300, k), torch.zeros(1, k)])
    for found, expected in zip(quantizer.quantize(rows.cuda()), quantizer.quantize(rows), strict=True):
        assert torch.equal(found.cpu(), expected)
    codes = quantizer.quantize(rows)
    on_gpu = type(codes)(*(part.cuda() for part in codes))
    assert torch.equal(quantizer.dequantize(on_gpu, k).cpu(), quantizer.dequantize(codes, k))
