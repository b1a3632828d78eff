"""Factored projections: what they compute, and that inner products are right on average."""

import pytest
import torch

from lightning_trak.projections import KroneckerProjection

CPU = torch.device("cpu")


def features(projection, gradients, seed=0):
    """Features of matrices ``(batch, *shape)`` by name, float64."""
    bound = projection.bind({name: part.shape[1:] for name, part in gradients.items()}, seed, 0, CPU)
    rows = torch.zeros(len(next(iter(gradients.values()))), bound.dim, dtype=torch.float64)
    for name, part in gradients.items():
        bound.add_(rows, name, part.reshape(len(part), -1))
    return rows


def test_features_are_the_cores_side_by_side():
    gradients = {"w": torch.randn(2, 9, 4, 5, dtype=torch.float64), "b": torch.randn(2, 9, dtype=torch.float64)}
    bound = KroneckerProjection(3, 6).bind({"w": (9, 4, 5), "b": (9,)}, 0, 0, CPU)
    left, right = (factor.double() for factor in bound.factors("w"))
    assert left.shape == (9, 3)
    assert right.shape == (20, 6)
    assert set(left.unique().tolist()) == {-1.0, 1.0}
    core = left.T @ gradients["w"].flatten(2) @ right / 18**0.5
    bias = gradients["b"] @ bound.factors("b")[0].double() / 3**0.5
    torch.testing.assert_close(features(KroneckerProjection(3, 6), gradients), torch.cat([core.flatten(1), bias], 1))


def test_short_sides_are_kept():
    gradients = {"w": torch.randn(2, 3, 4, dtype=torch.float64), "s": torch.randn(2, dtype=torch.float64)}
    rows = features(KroneckerProjection(16, 16), gradients)
    torch.testing.assert_close(rows, torch.cat([gradients["w"].flatten(1), gradients["s"][:, None]], 1))


@pytest.mark.slow
@pytest.mark.parametrize("dim", [None, 40])
def test_inner_products_are_unbiased(dim):
    torch.manual_seed(0)
    gradients = {"w": torch.randn(2, 12, 15, dtype=torch.float64), "b": torch.randn(2, 12, dtype=torch.float64)}
    gradients = {name: part + 0.5 for name, part in gradients.items()}
    expected = sum(float((part[0] * part[1]).sum()) for part in gradients.values())
    found = []
    for seed in range(1500):
        rows = features(KroneckerProjection(5, 4, dim), gradients, seed)
        found.append(float(rows[0] @ rows[1]))
    found = torch.tensor(found)
    assert abs(found.mean() - expected) < 4 * found.std() / len(found) ** 0.5


def test_factors_differ_between_names_sides_seeds_and_checkpoints():
    def left(seed=0, checkpoint=0, name="w"):
        return KroneckerProjection(8, 8).bind({name: (40, 40)}, seed, checkpoint, CPU).factors(name)

    assert not torch.equal(*left())
    for other in (left(seed=1), left(checkpoint=1), left(name="v")):
        assert not torch.equal(left()[0], other[0])
    assert torch.equal(left()[0], left()[0])


@pytest.mark.parametrize("wrong", [{"left": 0}, {"right": -1}, {"dim": 0}, {"left": 2.5}])
def test_refuses_impossible_sizes(wrong):
    with pytest.raises(ValueError, match=r"Expected `(left|right|dim)` to be a positive integer"):
        KroneckerProjection(**wrong)


def test_fingerprint():
    assert KroneckerProjection(4, 8, 100).fingerprint() == {
        "class": "KroneckerProjection", "left": 4, "right": 8, "dim": 100,
        "axes": "random", "sample": 512,
    }  # fmt: skip
