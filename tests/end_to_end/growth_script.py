"""What two processes run in `test_growth_distributed.py`."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from lightning_trak import TRAK
from lightning_trak.features.finiteness import NotFiniteError
from lightning_trak.projections import SparseProjection
from tests.end_to_end.test_growth_distributed import ALL, FEW, SPOILT
from tests.lit import TARGETS, make_model, make_trainer


def main(root: Path) -> None:
    checkpoints = torch.load(root / "checkpoints.pt")
    trainer = make_trainer(strategy="ddp", devices=2)
    results: dict[str, object] = {}

    def make(name: str, count: int = 2, seed: int = 0) -> TRAK:
        return TRAK(make_model(), checkpoints[:count], root / name, projection=SparseProjection(16), seed=seed)

    def featurize(trak: TRAK, data, **options) -> TRAK:
        trak.featurize(trainer, DataLoader(data, batch_size=4), shard_size=6, **options)
        return trak

    featurize(make("grown", 1), FEW)
    results["few"] = make("grown", 1).score(trainer, TARGETS)
    featurize(make("grown", 1), ALL)
    grown = featurize(make("grown"), ALL)
    results["grown"] = grown.score(trainer, TARGETS)

    featurize(make("overwritten", seed=1), FEW)
    make("overwritten", seed=1).score(trainer, TARGETS)
    results["overwritten"] = featurize(make("overwritten"), ALL, overwrite=True).score(trainer, TARGETS)

    for part in ("2/2", "1/2"):
        parts = featurize(make("parts"), ALL, part=part)
    results["parts"] = parts.score(trainer, TARGETS)

    try:
        featurize(make("spoilt"), SPOILT)
    except NotFiniteError as error:
        results["named"] = error.positions
    spoilt = featurize(make("spoilt"), SPOILT, on_nan="skip")
    results["spoilt"] = spoilt.score(trainer, TARGETS)
    results["best"] = spoilt.score(trainer, TARGETS, top_k=50, largest=True).indices
    torch.save(results, root / f"rank-{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    dist.destroy_process_group()
