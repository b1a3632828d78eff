"""Which sharded models are refused, and how."""

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader

from lightning_trak import TRAK
from lightning_trak.methods import RepresentationSimilarity
from lightning_trak.projections import SparseProjection
from lightning_trak.running.data.ranges import Range, share_out
from tests.end_to_end.test_fsdp import TARGETS, TRAIN, Net
from tests.lit import LitNet, OwnLinear, make_data, make_trainer

pytestmark = pytest.mark.slow


def sharding(**options):
    settings = {"data_parallel_size": 2, "tensor_parallel_size": 1} | options
    return make_trainer(strategy=ModelParallelStrategy(**settings), devices=2)


class Uncovered(Net):
    def __init__(self):
        super().__init__()
        self.head = OwnLinear(8, 3)


class Late(LitNet):
    """Makes its layers too late."""

    def __init__(self):
        super().__init__()
        self._modules.clear()

    def configure_model(self):
        raise AssertionError("called without need")


class Rotary(Net):
    def __init__(self):
        with torch.device("meta"):
            super().__init__()


class Meshless(LitNet):
    def configure_model(self):
        self.device_mesh["data_parallel"]


@pytest.mark.parametrize(
    ("make", "options", "match"),
    [
        (
            Uncovered,
            {},
            r"only be computed by hooks.*leave out 27.3% .*OwnLinear.*leave them out by parameters=.*strategy='ddp'",
        ),
        (LitNet, {}, r"must shard itself in LightningModule.configure_model\(\), but LitNet does not define"),
        (Late, {}, r"Late has no parameters before configure_model.*make the layers in __init__\(\)"),
        (Rotary, {}, "Rotary has buffers on the meta device .*, so no checkpoint holds their content: scale;"),
        (Net, {"engine": "functional"}, "engine='functional' needs whole parameters.* use engine='auto' or 'hooks'"),
    ],
)
def test_models_that_cannot_be_sharded_are_refused(tmp_path, checkpoints, make, options, match):
    trak = TRAK(make(), checkpoints, tmp_path / "store", projection=SparseProjection(32), **options)
    with pytest.raises(ValueError, match=match):
        trak.featurize(sharding(), TRAIN)
    assert not (tmp_path / "store").exists()


def test_a_store_of_another_engine_is_refused(tmp_path, checkpoints):
    options = {"projection": SparseProjection(32)}
    TRAK(Net(), checkpoints, tmp_path, engine="loop", **options).featurize(make_trainer(), TRAIN)
    for call in (TRAK.featurize, TRAK.score):
        with pytest.raises(ValueError, match="begun with engine 'loop', which needs whole parameters"):
            call(TRAK(Net(), checkpoints, tmp_path, **options), sharding(), TRAIN)


def test_a_model_that_only_runs_sharded_says_so_in_one_process(tmp_path, checkpoints):
    trak = TRAK(Meshless(), checkpoints, tmp_path, projection=SparseProjection(32))
    with pytest.raises(ValueError, match=r"fails without a device mesh.*return early if self.device_mesh is None"):
        trak.featurize(make_trainer(), TRAIN)


@pytest.mark.parametrize("sizes", [{}, {"data_parallel_size": 1, "tensor_parallel_size": 2}])
def test_tensor_parallelism_is_refused(tmp_path, checkpoints, sizes):
    trainer = make_trainer(strategy=ModelParallelStrategy(**sizes), devices=2)
    trak = TRAK(Net(), checkpoints, tmp_path, projection=SparseProjection(32))
    for call in (trak.featurize, trak.score):
        with pytest.raises(ValueError, match=r"tensor_parallel_size=2 .* use tensor_parallel_size=1 with data_par.*=2"):
            call(trainer, TRAIN)


def test_other_strategies_that_split_parameters_are_refused(tmp_path, checkpoints):
    trainer = make_trainer()
    trainer.strategy.__class__ = type("Sharded", (FSDPStrategy, type(trainer.strategy)), {})
    trak = TRAK(Net(), checkpoints, tmp_path, projection=SparseProjection(32))
    for call in (trak.featurize, trak.score):
        with pytest.raises(ValueError, match=r"splits the parameters over ranks.*ModelParallelStrategy"):
            call(trainer, TRAIN)
    with pytest.raises(ValueError, match="splits the parameters over ranks"):
        RepresentationSimilarity(Net(), checkpoints).attribute(trainer, TRAIN, TARGETS)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_get_equally_many_batches_and_each_example_once(world_size):
    loader = DataLoader(make_data(23), batch_size=3)
    jobs = [[Range(number, range(start, min(start + 7, 23))) for number, start in enumerate(range(0, 23, 7))]] * 2
    jobs.append([])

    class Rank:
        def __init__(self, number):
            self.global_rank, self.world_size = number, world_size

    ranks = [share_out(loader, jobs, Rank(number), even=True) for number in range(world_size)]
    for job, expected in zip(zip(*ranks, strict=True), ([*range(23)], [*range(23)], []), strict=True):
        batches = [list(part) for part in job]
        assert len({len(part) for part in batches}) == 1
        assert [len(part) for part in job] == [len(part) for part in batches]
        wanted = [batch.positions for part in batches for batch in part if batch.number is not None]
        assert sorted(torch.cat(wanted).tolist() if wanted else []) == expected
