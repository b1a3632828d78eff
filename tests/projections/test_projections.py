import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_trak.projections import (
    GaussianProjection,
    IdentityProjection,
    KroneckerProjection,
    RademacherProjection,
    SparseProjection,
)
from lightning_trak.projections.philox import Stream

CPU = torch.device("cpu")
DENSE = [GaussianProjection, RademacherProjection]
RANDOM = [GaussianProjection(64), RademacherProjection(64), SparseProjection(64)]
ALL = [*RANDOM, IdentityProjection()]
SIZES = {"a": 40, "b": 1, "c": 300}


def kind(projection):
    return type(projection).__name__


def bind(projection, sizes=SIZES, seed=0, checkpoint=0, device=CPU):
    return projection.bind({name: (size,) for name, size in sizes.items()}, seed, checkpoint, device)


def matrix(bound, name, dtype=torch.float64):
    """Rows of P that belong to a parameter, recovered by projecting the identity."""
    n = bound.sizes[name]
    rows = torch.zeros(n, bound.dim, dtype=dtype)
    bound.add_(rows, name, torch.eye(n, dtype=dtype))
    return rows


def project(bound, gradients, dtype=torch.float32):
    features = torch.zeros(len(next(iter(gradients.values()))), bound.dim, dtype=dtype)
    for name, gradient in gradients.items():
        bound.add_(features, name, gradient)
    return features


def random_gradients(batch, sizes=SIZES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(batch, n, generator=generator, dtype=dtype) for name, n in sizes.items()}


# The matrix


@pytest.mark.parametrize("dim", [1, 3, 10])
def test_gaussian_entries_are_the_box_muller_transform_of_the_words(dim):
    entries = matrix(bind(GaussianProjection(dim)), "a") * math.sqrt(dim)
    words = Stream.derive("GaussianProjection", 0, 0, "a").words(torch.arange(40), 3).tolist()
    for row in range(40):
        for column in range(dim):
            block, place = divmod(column, 4)
            u, angle = ((words[row][block][place % 2 + 2 * half] + 0.5 * (half == 0)) / 2**32 for half in range(2))
            turn = math.cos if place < 2 else math.sin
            expected = math.sqrt(-2 * math.log(u)) * turn(2 * math.pi * angle)
            assert entries[row, column].item() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("dim", [1, 33, 200])
def test_rademacher_entries_are_the_bits_of_the_words(dim):
    entries = matrix(bind(RademacherProjection(dim)), "a")
    words = Stream.derive("RademacherProjection", 0, 0, "a").words(torch.arange(40), 2).tolist()
    for row in range(40):
        bits = "".join(f"{word:032b}"[::-1] for block in words[row] for word in block)
        expected = torch.tensor([1.0 - 2.0 * int(bit) for bit in bits[:dim]], dtype=torch.float64)
        torch.testing.assert_close(entries[row], expected / math.sqrt(dim), rtol=1e-12, atol=0)


def test_gaussian_entries_are_normal():
    entries = (matrix(bind(GaussianProjection(200), {"w": 500}), "w") * math.sqrt(200)).flatten()
    assert stats.kstest(entries.numpy(), "norm").pvalue > 1e-3
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(entries.pow(power).mean() - moment) < 4 * math.sqrt(variance / len(entries))


def test_rademacher_entries_are_balanced():
    signs = matrix(bind(RademacherProjection(256), {"w": 400}), "w") * 16
    assert torch.equal(signs.abs(), torch.ones_like(signs))
    positive = int((signs > 0).sum())
    assert stats.binomtest(positive, signs.numel()).pvalue > 1e-3
    # Each of the 256 bits of a row is fair, and neighbours are uncorrelated.
    assert stats.kstest(signs.mean(0).numpy() * 20, "norm").pvalue > 1e-3
    assert abs((signs[:, 1:] * signs[:, :-1]).mean()) < 4 / math.sqrt(signs.numel())


@pytest.mark.parametrize("projection_class", DENSE)
def test_dense_entries_do_not_depend_on_dim(projection_class):
    narrow, wide = (matrix(bind(projection_class(dim)), "a") * math.sqrt(dim) for dim in (70, 300))
    torch.testing.assert_close(narrow, wide[:, :70], rtol=1e-12, atol=0)


# Johnson and Lindenstrauss


@pytest.mark.slow
@pytest.mark.parametrize("k", [16, 64, 256])
@pytest.mark.parametrize("projection", RANDOM[:2], ids=kind)
def test_inner_products_are_unbiased_with_variance_one_over_k(projection, k):
    """For x, y over two parameters, with <x, y> and the closed form of the variance clearly apart from zero."""
    sizes, trials, projection = {"a": 50, "b": 70}, 600, replace(projection, dim=k)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(120, generator=generator, dtype=torch.float64)
    y = 0.6 * x + torch.randn(120, generator=generator, dtype=torch.float64)
    products = torch.empty(trials, dtype=torch.float64)
    for seed in range(trials):
        parts = torch.stack((x, y)).split([50, 70], dim=1)
        features = project(bind(projection, sizes, seed), dict(zip(sizes, parts, strict=True)), torch.float64)
        products[seed] = features[0] @ features[1]

    exact = x @ y
    variance = (x @ x) * (y @ y) + exact**2
    if not isinstance(projection, GaussianProjection):
        variance -= 2 * (x**2 * y**2).sum()
    variance = variance / k
    assert abs(products.mean() - exact) < 4 * (variance / trials).sqrt()
    squares = (products - exact) ** 2
    assert abs(squares.mean() - variance) < 4 * squares.std() / math.sqrt(trials)
    assert squares.std() / math.sqrt(trials) < 0.15 * variance  # the line above can fail


# Identity of entries


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("projection", ALL, ids=kind)
def test_features_are_gradients_times_the_matrix(projection, dtype):
    bound, gradients = bind(projection), random_gradients(7, dtype=dtype)
    expected = sum(gradients[name].double() @ matrix(bound, name) for name in SIZES)
    features = project(bound, gradients, dtype)
    assert features.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(features.double(), expected, rtol=tolerance, atol=tolerance)
    start = torch.ones(7, bound.dim, dtype=dtype)
    bound.add_(start, "b", gradients["b"])
    torch.testing.assert_close(
        start.double() - 1, gradients["b"].double() @ matrix(bound, "b"), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("projection", RANDOM, ids=kind)
def test_entries_do_not_depend_on_other_parameters_or_their_order(projection):
    bound = bind(projection)
    for sizes in ({"c": 300, "a": 40, "b": 1}, {"c": 300}, {"x": 5, "c": 300}):
        assert torch.equal(matrix(bind(projection, sizes), "c"), matrix(bound, "c"))
    # Not even on the parameter's own size: the index alone counts.
    assert torch.equal(matrix(bind(projection, {"c": 90}), "c"), matrix(bound, "c")[:90])


@pytest.mark.parametrize("projection", RANDOM, ids=kind)
def test_entries_differ_between_seeds_checkpoints_names_and_kinds(projection):
    one = matrix(bind(projection, {"w": 50, "v": 50}), "w")
    others = [
        matrix(bind(projection, {"w": 50, "v": 50}, seed=1), "w"),
        matrix(bind(projection, {"w": 50, "v": 50}, checkpoint=1), "w"),
        matrix(bind(projection, {"w": 50, "v": 50}, seed=2**80), "w"),
        matrix(bind(projection, {"w": 50, "v": 50}), "v"),
    ]
    for other in others:
        agreement = (one * other).sum() / (one.norm() * other.norm())
        assert abs(agreement) < 4 / math.sqrt(50)


@pytest.mark.parametrize("projection", ALL, ids=kind)
@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_features_do_not_depend_on_the_batch_size(projection, batch_size):
    bound, gradients = bind(projection), random_gradients(11)
    whole = project(bound, gradients)
    parts = [
        project(bind(projection), {name: gradient[i : i + batch_size] for name, gradient in gradients.items()})
        for i in range(0, 11, batch_size)
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("projection", RANDOM, ids=kind)
def test_entries_do_not_depend_on_the_block_size(projection, monkeypatch):
    expected = matrix(bind(projection), "c")
    for values in (1, 130, 1000):
        monkeypatch.setattr("lightning_trak.projections.blocks._BLOCK_VALUES", values)
        torch.testing.assert_close(matrix(bind(projection), "c"), expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("projection", RANDOM, ids=kind)
def test_features_are_bit_identical_for_any_cache(projection, monkeypatch):
    monkeypatch.setattr("lightning_trak.projections.blocks._BLOCK_VALUES", 100)  # several blocks per parameter
    made = []
    original = type(projection).block
    monkeypatch.setattr(type(projection), "block", lambda *args: made.append(1) or original(*args))
    gradients = random_gradients(4)
    results, counts = [], []
    for cache_bytes in (0, 300, 1 << 30):
        bound = bind(replace(projection, cache_bytes=cache_bytes))
        first = project(bound, gradients)
        made.clear()
        results += [first, project(bound, gradients)]
        counts.append(len(made))
    assert all(torch.equal(result, results[0]) for result in results)
    assert counts[0] > counts[1] > counts[2] == 0  # nothing, some and all of the blocks were kept


def test_identity_concatenates_in_the_bound_order():
    gradients = random_gradients(3)
    bound = bind(IdentityProjection(), {"c": 300, "a": 40, "b": 1})
    assert bound.dim == 341
    expected = torch.cat([gradients[name] for name in ("c", "a", "b")], dim=1)
    assert torch.equal(project(bound, gradients), expected)


# Where it runs


@pytest.mark.parametrize("projection", ALL, ids=kind)
def test_empty_batch(projection):
    assert project(bind(projection), random_gradients(0)).shape == (0, bind(projection).dim)


@pytest.mark.parametrize("projection", ALL, ids=kind)
def test_autocast_and_default_dtype_change_nothing(projection):
    gradients = random_gradients(4)
    expected = project(bind(projection), gradients)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(project(bind(projection), gradients), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("projection", ALL, ids=kind)
def test_half_precision_gradients_are_summed_in_float32(projection):
    gradients = {name: gradient.bfloat16() for name, gradient in random_gradients(4).items()}
    expected = project(bind(projection), {name: gradient.float() for name, gradient in gradients.items()})
    assert torch.equal(project(bind(projection), gradients), expected)


@pytest.mark.parametrize("projection", ALL, ids=kind)
def test_works_across_inference_mode_and_autograd(projection):
    gradients = random_gradients(4)
    expected = project(bind(projection), gradients)
    with torch.inference_mode():
        bound = bind(projection)
        inside = project(bound, {name: gradient.clone() for name, gradient in gradients.items()})
    assert inside.is_inference()
    assert torch.equal(inside, expected)
    # Blocks cached in inference mode serve outside it, and no graph is recorded.
    outside = project(bound, {name: gradient.clone().requires_grad_() for name, gradient in gradients.items()})
    assert torch.equal(outside, expected)
    assert not outside.requires_grad
    assert not any(block.is_inference() for block in getattr(bound, "_cache", {}).values())


def test_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    for projection in RANDOM:
        project(bind(projection), random_gradients(2))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("projection", ALL, ids=kind)
def test_same_entries_on_cuda(projection):
    on_gpu = bind(projection, device=torch.device("cuda"))
    for name, n in SIZES.items():
        rows = torch.zeros(n, on_gpu.dim, dtype=torch.float64, device="cuda")
        on_gpu.add_(rows, name, torch.eye(n, dtype=torch.float64, device="cuda"))
        torch.testing.assert_close(rows.cpu(), matrix(bind(projection), name), rtol=2e-7, atol=1e-9)


# Configuration and errors


@pytest.mark.parametrize(
    ("projection", "expected"),
    [
        (GaussianProjection(8), {"class": "GaussianProjection", "dim": 8}),
        (RademacherProjection(8, cache_bytes=1), {"class": "RademacherProjection", "dim": 8}),
        (SparseProjection(8), {"class": "SparseProjection", "dim": 8}),
        (IdentityProjection(), {"class": "IdentityProjection"}),
    ],
    ids=kind,
)
def test_fingerprint_holds_what_changes_features(projection, expected):
    assert json.loads(json.dumps(projection.fingerprint())) == expected


@pytest.mark.parametrize("projection_class", [*DENSE, SparseProjection])
@pytest.mark.parametrize("dim", [0, -3, 2.0, True, None, "8"])
def test_refuses_impossible_dims(projection_class, dim):
    with pytest.raises(ValueError, match=f"`dim` to be a positive integer but got {dim!r}"):
        projection_class(dim)


@pytest.mark.parametrize("number", [np.int64, np.uint8, torch.tensor])
def test_takes_integers_of_any_type(number):
    for made, plain in (
        (SparseProjection(number(8)), SparseProjection(8)),
        (GaussianProjection(number(8)), GaussianProjection(8)),
        (KroneckerProjection(number(2), number(3), number(4)), KroneckerProjection(2, 3, 4)),
    ):
        assert made == plain
        assert json.dumps(made.fingerprint()) == json.dumps(plain.fingerprint())


@pytest.mark.parametrize("projection", ALL, ids=kind)
def test_refuses_what_does_not_fit(projection):
    bound = bind(projection)
    features, gradients = torch.zeros(2, bound.dim), torch.zeros(2, 40)
    with pytest.raises(ValueError, match="Unknown parameter 'z': this projection was bound to 3 others, such as 'a'"):
        bound.add_(features, "z", gradients)
    with pytest.raises(ValueError, match=r"gradients of 'c' to have shape \(batch, 300\) but got \(2, 40\)"):
        bound.add_(features, "c", gradients)
    with pytest.raises(ValueError, match=r"shape \(batch, 40\) but got \(2, 4, 11\)"):
        bound.add_(features, "a", torch.zeros(2, 4, 11))
    with pytest.raises(ValueError, match=rf"features of shape \(2, {bound.dim}\) but got \(1, {bound.dim}\)"):
        bound.add_(features[:1], "a", gradients)
    with pytest.raises(ValueError, match=r"features in float32 or float64.*got torch.bfloat16"):
        bound.add_(features.bfloat16(), "a", gradients)
    with pytest.raises(ValueError, match="at least one parameter"):
        bind(projection, {})
