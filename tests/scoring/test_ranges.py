"""Gram matrices of very small and very large features, whose products are outside the range of float32."""

import pytest
import torch

from lightning_trak.features.rows import Features
from lightning_trak.scoring.newton.gram import gram_matrix


@pytest.mark.parametrize(("scale", "curvature"), [(2.0**-75, 1.0), (2.0**-20, 2.0**-110), (2.0**80, 1.0), (0.0, 1.0)])
@pytest.mark.parametrize("kind", ["gauss_newton", "identity"])
def test_a_gram_matrix_has_the_square_of_the_scale_of_its_features(scale, curvature, kind):
    generator = torch.Generator().manual_seed(0)
    phi, weights = torch.randn(20, 5, generator=generator), torch.rand(20, generator=generator)

    def gram(scale, curvature):
        rows = Features(phi * scale, weights, weights, weights * curvature)
        return gram_matrix([rows], kind, 5, torch.device("cpu"))

    expected, squared_weights = gram(1.0, 1.0)
    factor = scale**2 * (curvature if kind == "gauss_newton" else 1.0)
    found, found_squares = gram(scale, curvature)
    assert torch.equal(found, expected * factor)
    assert torch.equal(found_squares, squared_weights * factor**2)


def test_blocks_without_examples_add_nothing():
    none = Features(torch.empty(0, 5), *[torch.empty(0)] * 3)
    gram, squared_weights = gram_matrix([none], "gauss_newton", 5, torch.device("cpu"))
    assert torch.equal(gram, torch.zeros(5, 5).double())
    assert float(squared_weights) == 0
