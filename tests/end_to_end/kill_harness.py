"""Runs featurize and score in child processes, kills them with SIGKILL at random moments, and checks what is left.

A script of its own: children are forked before torch has started any thread.
"""

import random
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_trak import TRAK
from lightning_trak.features.store import FeatureStore
from lightning_trak.projections import SparseProjection
from tests.killing import die_in_file_operation, run_forked
from tests.lit import make_checkpoints, make_data, make_model, make_trainer

NUM_SHARDS = 24  # 12 at each of two checkpoints


def job(folder: Path, journal: Path, checkpoints: list[dict[str, torch.Tensor]], die_at: int | None) -> None:
    """What a user runs; with ``die_at``, killed in the middle of that many file operations."""
    die_in_file_operation(die_at)
    save = FeatureStore.save

    def noted(self: FeatureStore, checkpoint: int, shard: int, *args: Any) -> None:
        with journal.open("a") as file:
            file.write(f"{self._shard_path(checkpoint, shard).relative_to(folder / 'store')}\n")
        save(self, checkpoint, shard, *args)

    FeatureStore.save = noted  # type: ignore[method-assign]
    trak = TRAK(make_model(), checkpoints, folder / "store", projection=SparseProjection(16))
    trainer = make_trainer()
    trak.featurize(trainer, DataLoader(make_data(60), batch_size=5), shard_size=5)
    torch.save(trak.score(trainer, DataLoader(make_data(7, seed=1), batch_size=3)), folder / "scores.pt")


def finished(folder: Path) -> set[str]:
    return {str(path.relative_to(folder / "store")) for path in (folder / "store").rglob("shard-*.safetensors")}


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*.safetensors") if not path.name.startswith(".")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in [*files, folder / "scores.pt"]}


def main() -> None:
    root = Path(sys.argv[1])
    checkpoints = torch.load(root / "checkpoints.pt")
    draw = random.Random(int(sys.argv[2]))

    def attempt(folder: Path, die_at: int | None, patience: float | None = None) -> tuple[int, set[str]]:
        """Run the job; returns its exit code, and the shards that it computed. Kills it after ``patience`` seconds."""
        journal = folder / "journal"
        journal.unlink(missing_ok=True)
        before = finished(folder)
        code = run_forked(job, folder, journal, checkpoints, die_at, patience=patience)
        computed = journal.read_text().split() if journal.exists() else []
        assert len(computed) == len(set(computed)), "a shard was computed twice in one run"
        assert not before & set(computed), f"finished shards were computed again: {before & set(computed)}"
        return code, set(computed)

    (root / "whole").mkdir()
    code, computed = attempt(root / "whole", None)
    assert code == 0
    assert len(computed) == NUM_SHARDS

    (root / "killed").mkdir()
    killed_with = []
    for die_at, patience in [
        *[(draw.randrange(1, 20), None) for _ in range(5)],
        *[(None, draw.uniform(0.0, 0.4)) for _ in range(4)],
        *[(draw.randrange(1, 40), None) for _ in range(4)],
    ]:
        before = len(finished(root / "killed"))
        code, _ = attempt(root / "killed", die_at, patience)
        killed_with.append((die_at, patience and round(patience, 2), code, before, len(finished(root / "killed"))))
    print(killed_with)
    assert sum(code == -signal.SIGKILL for _, _, code, _, _ in killed_with) >= 4
    assert any(before < after < NUM_SHARDS for _, _, _, before, after in killed_with), "no kill left a part"
    # Once all shards are there, what is left to interrupt is scoring: the Gram matrices and the scores.
    code, _ = attempt(root / "killed", None)
    assert code == 0
    for path in (root / "killed" / "store").rglob("gram-*"):
        path.unlink()
    code, computed = attempt(root / "killed", draw.randrange(1, 6))
    assert code == -signal.SIGKILL
    assert not computed
    code, computed = attempt(root / "killed", None)
    assert code == 0
    assert not computed
    assert contents(root / "killed") == contents(root / "whole"), "not bit-identical to the uninterrupted run"
    assert not list((root / "killed" / "store").rglob(".*")), "killed writes have left something"
    print("identical")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        main()
    else:
        torch.save(make_checkpoints(2), Path(sys.argv[1]) / "checkpoints.pt")
