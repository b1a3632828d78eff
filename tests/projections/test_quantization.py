"""Rows as integers: near what they were, the same bits in every batch, and right for rows that are hard."""

import math

import pytest
import torch

from lightning_trak.projections.quantization import _OUTERMOST, LEVELS, Int4, Int8
from lightning_trak.projections.rotation import rotated

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


@pytest.mark.parametrize("k", [401, 2048, 16384])
@BOTH
def test_the_error_of_normal_numbers_is_as_said(quantizer, k):
    assert 0.6 * quantizer.error < error(quantizer, gaussian(20, k)) < 1.05 * quantizer.error


def spike(n, k, seed=0):
    """One number a row that is not zero."""
    return torch.eye(k)[(7 * torch.arange(n) + seed) % k]


def few_large(n, k, seed=0):
    """A twentieth of the columns are a thousand times larger than the rest."""
    return gaussian(n, k, seed) * torch.where(torch.arange(k) % 20 == 0, 1000.0, 1.0)


@pytest.mark.parametrize("k", [64, 401, 2048])
@pytest.mark.parametrize("rows", [gaussian, heavy_tailed, spike, few_large])
@BOTH
def test_rotated_rows_have_the_error_of_normal_numbers(quantizer, rows, k):
    given = rotated(rows(20, k))
    assert error(quantizer, given) < 1.05 * quantizer.error


@pytest.mark.parametrize("k", [1, 2, 3, 4, 7, 64, 401, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rotation_keeps_inner_products(k, dtype):
    rows = heavy_tailed(9, k).to(dtype)
    turned = rotated(rows)
    assert turned.dtype == dtype
    assert turned.shape == rows.shape
    tolerance = {"rtol": 0, "atol": 1e-6 * float(rows.square().sum(1).max())}
    torch.testing.assert_close(turned @ turned.T, rows @ rows.T, **tolerance)
    assert torch.equal(rotated(rows[2:3]), turned[2:3]) or torch.allclose(rotated(rows[2:3]), turned[2:3], rtol=1e-5)


def test_a_rotation_is_the_hartley_transform_after_signs():
    k = 7
    turned = rotated(torch.eye(k, dtype=torch.float64))
    angles = 2 * math.pi / k * torch.outer(torch.arange(k), torch.arange(k)).double()
    matrix = (angles.cos() + angles.sin()) / math.sqrt(k)
    torch.testing.assert_close(turned.abs(), matrix.abs(), rtol=0, atol=1e-12)
    signs = (turned[:, 0] * math.sqrt(k)).round()
    torch.testing.assert_close(turned, signs[:, None] * matrix, rtol=0, atol=1e-12)
    assert set(signs.tolist()) == {-1.0, 1.0}


def test_the_levels_are_those_of_least_squared_error():
    levels = torch.tensor(LEVELS, dtype=torch.float64) / 46
    end = torch.tensor([math.inf], dtype=torch.float64)
    for _ in range(2000):  # Lloyd's algorithm: levels move to the mean of what is nearest to them
        borders = torch.cat([-end, (levels[1:] + levels[:-1]) / 2, end])
        density = torch.exp(-borders.square() / 2) / math.sqrt(2 * math.pi)
        levels = -density.diff() / torch.special.ndtr(borders).diff()
    assert (levels / levels[15] * 127).round().int().tolist() == list(LEVELS)
    assert float(levels[15]) == pytest.approx(_OUTERMOST, abs=1e-4)


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


@pytest.mark.parametrize("value", [1.0, -1.0, 3e38, -3.4e38, 1e-38])
@pytest.mark.parametrize("k", [1, 5, 64])
@BOTH
def test_one_number_of_any_size(quantizer, k, value):
    rows = torch.zeros(2, k)
    rows[0, k // 2] = value
    given = rotated(rows)
    wrong = there_and_back(quantizer, given) - given
    assert float((wrong / abs(value)).norm()) < 1.4 * quantizer.error


@pytest.mark.parametrize("size", [1e-44, 1e-42, 1e-39, 1e-30, 1e30, 5e37])
@BOTH
def test_the_size_of_a_row_makes_no_difference(quantizer, size):
    rows = gaussian(4, 501) * size
    unit = 2.0**-149  # of subnormal numbers, to which results are rounded
    wrong = (there_and_back(quantizer, rows).double() - rows.double()).norm(dim=1)
    assert (wrong < (0.012 if quantizer is INT8 else 0.13) * rows.double().norm(dim=1) + unit * 501**0.5).all()


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
