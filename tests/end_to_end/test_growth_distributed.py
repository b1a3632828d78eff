"""Stores that grow, are overwritten, are made in parts, and leave examples out: two real processes against one."""

import pytest
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_trak import TRAK
from lightning_trak.projections import SparseProjection
from tests.launch import run_together
from tests.lit import TARGETS, make_checkpoints, make_data, make_model, make_trainer

pytestmark = pytest.mark.slow

ALL = make_data(53)
FEW, BAD = Subset(ALL, range(40)), [1, 30, 52]
SPOILT = TensorDataset(*(tensor.clone() for tensor in ALL.tensors))
SPOILT.tensors[0][BAD] = torch.nan


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("growth")
    checkpoints = make_checkpoints(2)
    torch.save(checkpoints, root / "checkpoints.pt")
    run_together("tests.end_to_end.growth_script", root)

    def alone(name, data, count=2, **options):
        trak = TRAK(make_model(), checkpoints[:count], root / name, projection=SparseProjection(16))
        trak.featurize(make_trainer(), DataLoader(data, batch_size=4), shard_size=6, **options)
        return trak.score(make_trainer(), TARGETS)

    return [torch.load(root / f"rank-{rank}.pt") for rank in range(2)], alone


def test_both_ranks_have_the_scores_of_one_process(runs):
    ranks, alone = runs
    few, whole = alone("few alone", FEW, 1), alone("alone", ALL)
    for rank in ranks:
        torch.testing.assert_close(rank["few"], few, rtol=1e-4, atol=1e-5)
        for name in ("grown", "overwritten", "parts"):
            torch.testing.assert_close(rank[name], whole, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:TRAK")
def test_both_ranks_name_and_leave_out_the_same_examples(runs):
    ranks, alone = runs
    expected = alone("spoilt alone", SPOILT, on_nan="skip")
    for rank in ranks:
        assert rank["named"] == BAD
        torch.testing.assert_close(rank["spoilt"], expected, rtol=1e-4, atol=1e-5)
        assert rank["best"].sort().values.tolist() == [[i for i in range(53) if i not in BAD]] * len(TARGETS)
