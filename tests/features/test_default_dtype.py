"""By default, features are stored as precisely as 8 KiB for each example allow."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import TRAK
from lightning_trak.outputs import ClassificationMargin
from lightning_trak.projections import SparseProjection

EXAMPLES = 3


def featurized(path, inputs, **options):
    """A method whose store holds the features of a linear model with two classes."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(EXAMPLES, inputs), torch.tensor([0, 1, 0]))
    trak = TRAK(nn.Linear(inputs, 2, bias=False), store=path, output=ClassificationMargin(), damping=1.0, **options)
    trak.featurize(data=DataLoader(data))
    return trak, data


@pytest.mark.parametrize(
    ("inputs", "k", "dtype", "size"),
    [
        (1024, 2048, "float32", 8192),
        (1025, 2050, "int8", 2050),
        (4096, 8192, "int8", 8192),
        (4097, 8194, "int4", 4097),
        (9000, 16384, "int4", 8192),
    ],
)
def test_the_default_follows_the_number_of_features(tmp_path, inputs, k, dtype, size):
    trak, data = featurized(tmp_path, inputs)
    rows = trak.open_store().read_stored(0, 0)
    assert (rows.k, rows.dtype.name) == (k, dtype)
    assert rows.codes[0].nbytes == size
    assert trak.score(data=DataLoader(data)).shape == (EXAMPLES, EXAMPLES)


def test_a_projection_of_ones_own_is_stored_in_float32(tmp_path):
    trak, _ = featurized(tmp_path, 4097, projection=SparseProjection(8192))
    assert trak.open_store().read_stored(0, 0).dtype.name == "float32"


def test_a_store_by_default_is_that_with_its_dtype(tmp_path):
    featurized(tmp_path, 4096)
    trak = featurized(tmp_path, 4096, dtype="int8")[0]
    assert trak.open_store().read_stored(0, 0).dtype.name == "int8"
    with pytest.raises(ValueError, match="made with dtype int8, this TRAK has dtype int4"):
        featurized(tmp_path, 4096, dtype="int4")
