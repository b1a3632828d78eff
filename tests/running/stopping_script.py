"""What two processes run in `test_stopping.py`: a signal for one stops both; data are prepared before either reads."""

import os
import signal
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from lightning_trak import TRAK
from lightning_trak.projections import SparseProjection
from lightning_trak.running.data import content
from lightning_trak.running.stopping import Terminated
from tests.lit import TARGETS, TRAIN, make_checkpoints, make_model, make_trainer
from tests.running.test_stopping import FEW, Signalling, shards


class Prepared(L.LightningDataModule):
    def __init__(self, root: Path) -> None:
        super().__init__()
        self.root = root
        self.prepare_data_per_node = False

    def prepare_data(self) -> None:
        while not (self.root / "rank 1 is here").exists():  # and would read before this is done, if it did not wait
            pass
        (self.root / f"prepared by {os.environ.get('LOCAL_RANK', '0')}").touch()

    def setup(self, stage: str) -> None:
        assert [path.name for path in self.root.glob("prepared*")] == ["prepared by 0"]
        self.data = TRAIN

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.data, batch_size=5)


def main(root: Path) -> None:
    content.MANY = FEW
    trainer = make_trainer(strategy="ddp", devices=2)
    checkpoints = make_checkpoints(2)
    if trainer.global_rank == 1:
        (root / "rank 1 is here").touch()
    prepared = TRAK(make_model(), checkpoints, root / "store", projection=SparseProjection(32))
    prepared.featurize(trainer, Prepared(root), shard_size=10)
    expected = prepared.score(trainer, TARGETS)

    for told in (0, 1):
        trak = TRAK(make_model(), checkpoints, root / str(told), projection=SparseProjection(32))
        first = {0: 3, 1: 13}[told]  # in the first shard of that rank
        data = Signalling(TRAIN, {first: signal.SIGTERM} if trainer.global_rank == told else {})
        with pytest.raises(Terminated, match="stopped by SIGTERM"):
            trak.featurize(trainer, DataLoader(data, batch_size=5), shard_size=10)
        assert 0 < len(shards(root / str(told))) < 10
        trak.featurize(trainer, DataLoader(TRAIN, batch_size=5), shard_size=10)
        assert torch.equal(trak.score(trainer, TARGETS), expected)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    dist.destroy_process_group()
