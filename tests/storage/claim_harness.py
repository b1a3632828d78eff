"""Processes that open the same directory at once, or are killed while they do.

A script of its own: children are forked before torch has started any thread.
"""

import fcntl
import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lightning_trak.features.store import FeatureStore
from lightning_trak.retraining.fleets.members import Member, MemberStore
from tests.killing import context

MASKS = torch.tensor([[True, False, True]])
WON = "won"
Open = Callable[[Path, int], Any]


def open_store(directory: Path, seed: int) -> FeatureStore:
    identity = {"seed": seed, "dtype": "float32", "checkpoints": ["a"]}
    return FeatureStore(directory, identity, 10, shard_size=5, user="run")


def open_fleet(directory: Path, seed: int) -> MemberStore:
    fleet = MemberStore(directory, {"num_targets": 3, "seed": seed}, MASKS)
    fleet.record_failure(Member(0, seed), RuntimeError("bad weather"))
    return fleet


KINDS: dict[str, tuple[Open, str]] = {"store": (open_store, "run"), "fleet": (open_fleet, "one")}


def attempt(make: Open, directory: Path, seed: int, start: Any, end: Any, outcomes: Any, die_at: int | None) -> None:
    """Open a directory when all others do, and hold it until all have; with ``die_at``, killed in that operation."""
    operations = itertools.count(1)

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(operations) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    start.wait()
    if die_at is not None:
        for name in ("link", "replace", "fsync", "mkdir", "open", "unlink"):
            setattr(os, name, counted(getattr(os, name)))
        fcntl.flock = counted(fcntl.flock)
    try:
        opened, outcome = make(directory, seed), WON
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
        opened = None
    outcomes.put((seed, outcome))
    end.wait()
    del opened  # until here it held the directory
    os._exit(0)  # at once, as the claim must end with the process in any case; tidying up takes longer than the test


def race(
    make: Open, directory: Path, seeds: Sequence[int], die_at: int | None = None
) -> tuple[list[tuple[int, str]], bool]:
    """Open a directory in a process for each seed; the last one dies if it is to.

    Returns:
        The outcome for each of the others, and whether the last one was killed.
    """
    living = len(seeds) if die_at is None else len(seeds) - 1
    start, end, outcomes = context.Barrier(len(seeds)), context.Barrier(living + 1), context.SimpleQueue()
    doomed_end, doomed_outcomes = context.Barrier(1), context.SimpleQueue()
    processes = [
        context.Process(
            target=attempt,
            args=(make, directory, seed, start, end, outcomes, None)
            if number < living
            else (make, directory, seed, start, doomed_end, doomed_outcomes, die_at),
        )
        for number, seed in enumerate(seeds)
    ]
    for process in processes:
        process.start()
    found = [outcomes.get() for _ in range(living)]
    end.wait()
    for process in processes:
        process.join()
    assert all(process.exitcode == 0 for process in processes[:living])
    return found, processes[-1].exitcode == -signal.SIGKILL


def seed_of(directory: Path) -> int:
    return int(json.loads((directory / "manifest.json").read_text())["identity"]["seed"])


def require_one_winner(directory: Path, found: Sequence[tuple[int, str]], user: str) -> None:
    winner = seed_of(directory)
    assert winner in {seed for seed, _ in found}, f"{directory} belongs to nobody: {found}"
    for seed, outcome in found:
        kind = "store" if user == "run" else "fleet"
        refused = (
            f'ValueError: {kind} "{directory}" was made with seed {winner}, this {user} has seed {seed}; use another'
            " directory or the same seed"
        )
        assert outcome == WON if seed == winner else outcome.startswith(refused), f"{winner} won, but {found}"
    assert not list(directory.rglob(".*")), "something was left"


def main() -> None:
    root = Path(sys.argv[1])
    numbers = itertools.count()
    for name, (make, user) in KINDS.items():
        for earlier in (1, 9):  # a run that has ended without a result
            assert race(make, root / f"{name}-of-{earlier}", [earlier])[0] == [(earlier, WON)]

        def directory_after(earlier: int | None, name: str = name) -> Path:
            directory = root / f"{name}-{next(numbers)}"
            if earlier is not None:
                shutil.copytree(root / f"{name}-of-{earlier}", directory)
            return directory

        winners = set()
        for seeds in [(1, 2, 3, 4), (1, 1, 1, 1), (1, 2, 1, 2)] * 2:
            for earlier in (None, 9, 1):
                directory = directory_after(earlier)
                found, _ = race(make, directory, seeds)
                require_one_winner(directory, found, user)
                winners.add(seed_of(directory))
        print(name, "was won by", winners)

        for earlier, rivals in itertools.product((None, 9), ((), (1, 2))):
            deaths = 0
            for die_at in range(1, 18):
                directory = directory_after(earlier)
                found, killed = race(make, directory, [*rivals, 3], die_at)
                deaths += killed
                for seed, outcome in found:
                    assert outcome == WON or f"this {user} has seed {seed}; use another" in outcome, found
                assert sum(outcome == WON for _, outcome in found) <= 1, found
                with suppress(FileNotFoundError):
                    seed_of(directory)  # a manifest is whole, if there is one
                opened = make(directory, 4)  # nobody is alive, and there is no result
                require_one_winner(directory, [(4, WON)], user)
                del opened
                if name == "fleet":
                    notes = [path.name for path in directory.glob("failures/*")]
                    assert notes == ["subset-00000-seed-004.json"], notes
            # Alone it dies wherever it is told to, up to its last operation; beside rivals it may be refused before.
            assert deaths > (10 if not rivals else 2), deaths
            print(name, "was killed in", deaths, "operations beside", rivals)
    print("one winner")


if __name__ == "__main__":
    main()
