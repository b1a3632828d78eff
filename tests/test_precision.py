"""Gradients in half precision: features are summed in float32, and scores stay what they were but for rounding."""

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_trak import TRAK
from lightning_trak.projections import KroneckerProjection, SparseProjection
from lightning_trak.store import FeatureStore
from tests.lit import make_checkpoints, make_data, make_model, make_trainer


def scores(directory, precision, projection, engine):
    trainer = make_trainer(precision=precision)
    trak = TRAK(make_model(), make_checkpoints(2), directory, projection=projection, engine=engine, damping=1.0)
    trak.featurize(trainer, DataLoader(make_data(60), batch_size=16))
    return trak.score(trainer, DataLoader(make_data(20, seed=1), batch_size=16))


@pytest.mark.parametrize("engine", ["hooks", "functional"])
@pytest.mark.parametrize("projection", [SparseProjection(64), KroneckerProjection(4, 4)], ids=["sparse", "kronecker"])
def test_scores_in_bfloat16(tmp_path, engine, projection):
    exact = scores(tmp_path / "32", "32-true", projection, engine)
    rough = scores(tmp_path / "16", "bf16-true", projection, engine)
    assert rough.dtype == torch.float32
    assert float(torch.corrcoef(torch.stack([exact.flatten(), rough.flatten()]))[0, 1]) > 0.995
    manifest = FeatureStore.read_manifest(tmp_path / "16")
    store = FeatureStore(tmp_path / "16", manifest["identity"], manifest["num_examples"], read_only=True)
    features = store.read(0, 0).features
    assert features.dtype == torch.float32
    assert (features != features.bfloat16()).any(), "sums must not be rounded to bfloat16"


def test_a_store_in_another_precision_is_refused(tmp_path):
    scores(tmp_path, "32-true", SparseProjection(64), "auto")
    with pytest.raises(ValueError, match="was made with precision 32-true, this TRAK has precision bf16-true"):
        scores(tmp_path, "bf16-true", SparseProjection(64), "auto")
