"""Runs a fleet in child processes, kills them with SIGKILL at random moments, and checks what is left.

A script of its own: children are forked before torch has started any thread.
"""

import os
import random
import signal
import sys
from pathlib import Path

from torch.utils.data import DataLoader

from lightning_trak.retraining import RetrainingFleet, random_subsets
from tests.killing import context, die_in_file_operation, run_forked
from tests.lit import LitNet, make_data, make_trainer

MEMBERS = 12
JOURNAL = "journal"


class Noted(LitNet):
    """Notes in the journal whenever a member is trained."""

    def on_train_start(self) -> None:
        with Path(os.environ[JOURNAL]).open("a") as file:
            file.write("trained\n")


def job(folder: Path, die_at: int | None, part: str | None, together: int | None) -> None:
    """What a user runs; with ``die_at``, killed in the middle of that many file operations."""
    os.environ[JOURNAL] = str(folder / JOURNAL)
    die_in_file_operation(die_at)
    fleet = RetrainingFleet(
        folder / "fleet",
        LitNet if together else Noted,
        lambda: make_trainer(max_epochs=2),
        DataLoader(make_data(30), batch_size=5),
        make_data(9, seed=1),
        random_subsets(30, MEMBERS // 2),
        num_seeds=2,
    )
    fleet.run(part, together=together, progress_bar=False)


def members(folder: Path) -> dict[str, bytes]:
    """Members under their own names, whole or not."""
    return {path.name: path.read_bytes() for path in (folder / "fleet" / "members").glob("subset-*.safetensors")}


def main() -> None:
    root = Path(sys.argv[1])
    draw = random.Random(int(sys.argv[2]))

    def attempt(folder: Path, die_at: int | None, patience: float | None = None, together: int | None = None) -> int:
        """Run the fleet, and kill it after ``patience`` seconds; its exit code."""
        (folder / JOURNAL).unlink(missing_ok=True)
        before = members(folder)
        code = run_forked(job, folder, die_at, None, together, patience=patience)
        after = members(folder)
        assert {name: after[name] for name in before} == before, "what was finished has changed"
        assert all(whole[name] == content for name, content in after.items()), "a member is not what it should be"
        if code == 0 and together is None:
            trained = len((folder / JOURNAL).read_text().split()) if (folder / JOURNAL).exists() else 0
            assert trained == MEMBERS - len(before), "a finished member was trained again"
        return code

    for together in (None, 4):
        folder = root / f"whole-{together}"
        folder.mkdir()
        assert run_forked(job, folder, None, None, together) == 0
        whole = members(folder)
        assert len(whole) == MEMBERS

        killed = root / f"killed-{together}"
        killed.mkdir()
        codes, counts = [], []
        # The manifest and the masks take five operations, each member three.
        first, then = draw.randrange(13, 18), draw.randrange(1, 10)
        for die_at, patience in ((first, None), (then, None), (None, draw.uniform(0.1, 0.4))):
            codes.append(attempt(killed, die_at, patience, together))
            counts.append(len(members(killed)))
        assert codes[:2] == [-signal.SIGKILL] * 2, codes
        assert any(0 < count < MEMBERS for count in counts), "no kill left a part"
        assert attempt(killed, None, together=together) == 0
        assert members(killed) == whole, "not bit-identical to the uninterrupted run"
        assert not list((killed / "fleet").rglob(".*")), "killed writes have left something"

    # Two processes at once on the two halves of a fleet, one of which dies.
    shared = root / "shared"
    shared.mkdir()
    parts = (None, "1/2"), (9, "2/2")
    processes = [context.Process(target=job, args=(shared, die_at, part, None)) for die_at, part in parts]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, -signal.SIGKILL]
    whole = members(root / "whole-None")
    assert MEMBERS // 2 <= len(members(shared)) < MEMBERS
    assert attempt(shared, None) == 0
    assert members(shared) == whole
    print("identical")


if __name__ == "__main__":
    main()
