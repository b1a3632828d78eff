"""A rival for a directory, at any moment of a claim."""

import fcntl
import json
import os
import re

import pytest

from tests.launch import run_module
from tests.storage.boxes import claim, in_another_process, refusal, refuse_links, tree


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the harness forks")
def test_one_of_many_processes_wins(tmp_path):
    assert "one winner" in run_module("tests.storage.claim_harness", str(tmp_path))


class Waits(BaseException):
    """A process would wait for a lock that the test's own process holds."""


class Interleaving:
    """Runs a rival in the middle of another claim: before its n-th step in the file system.

    A change of a lock is two steps, as the kernel lets the old one go before it gives the new one.
    """

    def __init__(self, monkeypatch, rival, before):
        self.steps, self.rival, self.before, self.inside = 0, rival, before, False
        for owner, name in [(os, "link"), (os, "replace"), (os.path, "lexists"), (os, "open"), (os, "mkdir")]:
            monkeypatch.setattr(owner, name, self._stepping(getattr(owner, name)))
        monkeypatch.setattr(fcntl, "flock", self._locking(fcntl.flock))

    def _step(self):
        if not self.inside:
            self.steps += 1
            if self.steps == self.before:
                self.inside = True
                self.rival()
                self.inside = False

    def _stepping(self, function):
        def call(*args, **options):
            self._step()
            return function(*args, **options)

        return call

    def _locking(self, flock):
        def take(descriptor, operation):
            flock(descriptor, fcntl.LOCK_UN)
            self._step()
            try:
                flock(descriptor, operation | fcntl.LOCK_NB)
            except BlockingIOError:
                if operation & fcntl.LOCK_NB:
                    raise
                raise Waits from None

        return take


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
@pytest.mark.parametrize("before", ["new", "abandoned", "held"])
@pytest.mark.parametrize("seed", [1, 9], ids=["another", "same"])
@pytest.mark.parametrize("rival_dies", [False, True], ids=["rival lives", "rival dies"])
def test_a_rival_at_any_moment(tmp_path, monkeypatch, links, before, seed, rival_dies):
    """However two claims interleave, one wins, and the other is told who.

    The directory is new, or of an earlier run 9 of a process that has ended, or of this process.
    """
    for number in range(1, 100):
        directory, outcomes, waited = tmp_path / str(number), {}, []
        earlier = claim(directory, 9) if before != "new" else None
        if before == "abandoned":
            del earlier

        def attempt(run, make, outcomes=outcomes):
            try:
                outcomes[run] = make()
            except ValueError as error:
                outcomes[run] = str(error)

        def rival(directory=directory, outcomes=outcomes, waited=waited):
            try:
                attempt(2, lambda: in_another_process(monkeypatch, directory, 2), outcomes)
            except Waits:
                waited.append(True)
            if rival_dies:
                outcomes.pop(2, None)

        with monkeypatch.context() as patched:
            if not links:
                patched.setattr(os, "link", refuse_links)
            interleaving = Interleaving(patched, rival, number)
            attempt(seed, lambda: claim(directory, seed))  # noqa: B023
        if interleaving.steps < number:
            assert number > (3 if before != "new" and seed == 9 else 8)  # joining takes fewer steps
            break
        if waited:
            rival()
        winner = json.loads((directory / "manifest.json").read_text())["identity"]["seed"]
        assert set(outcomes) == ({seed} if rival_dies else {seed, 2})
        assert winner == seed or not rival_dies
        for who, outcome in outcomes.items():
            if who == winner:
                outcome.require_unchanged()
            else:
                holders = (
                    f"[{winner}9]" if before == "held" else winner
                )  # run 9 had it until this process claimed it anew
                assert re.search(refusal(holders, who), outcome), (number, outcomes)
        assert winner in outcomes, (number, outcomes)
        assert tree(directory) == {"manifest.json"}
