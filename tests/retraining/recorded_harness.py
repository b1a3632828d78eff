"""Runs fleets of a recorded run in child processes that are killed with SIGKILL, and checks what is left.

A script of its own: children are forked before torch has started any thread.
"""

import signal
import sys
from pathlib import Path

from lightning_trak.retraining import RecordedFleet, random_removals
from tests.callback_nets import make_trainer
from tests.killing import die_in_file_operation, run_forked
from tests.replay.runs import NUM_TRAIN, Net, make_data, train

MEMBERS = 6


def job(folder: Path, recording: Path, die_at: int | None, together: int | None) -> None:
    """What a user runs; with ``die_at``, killed in the middle of that many file operations."""
    die_in_file_operation(die_at)
    masks = random_removals(NUM_TRAIN, MEMBERS, 0.2)
    targets = make_data(3, seed=5)
    RecordedFleet(folder, Net(), recording, make_trainer(), make_data(), targets, masks).run(
        together=together, progress_bar=False
    )


def members(folder: Path) -> dict[str, bytes]:
    """Members under their own names."""
    return {path.name: path.read_bytes() for path in (folder / "members").glob("subset-*.safetensors")}


def main() -> None:
    root = Path(sys.argv[1])

    def attempt(folder: Path, die_at: int | None, together: int | None) -> int:
        before = members(folder)
        code = run_forked(job, folder, root / "recording", die_at, together)
        after = members(folder)
        assert {name: after[name] for name in before} == before, "what was finished has changed"
        return code

    assert run_forked(train, Net(), make_data(), root / "recording") == 0
    for together, kills in ((None, (3, 10, 6)), (4, (10,))):
        whole, killed = root / f"whole-{together}", root / f"killed-{together}"
        assert attempt(whole, None, together) == 0
        counts = []
        # The manifest and the masks take five operations, each member three.
        for die_at in kills:
            assert attempt(killed, die_at, together) == -signal.SIGKILL
            counts.append(len(members(killed)))
        assert 0 < counts[-1] < MEMBERS, counts
        assert attempt(killed, None, together) == 0
        assert members(killed) == members(whole), "not bit-identical to the uninterrupted run"
        assert len(members(killed)) == MEMBERS
        assert not list(killed.rglob(".*")), "killed writes have left something"
    print("identical")


if __name__ == "__main__":
    main()
