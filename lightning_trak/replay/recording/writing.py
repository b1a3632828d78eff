"""Writes the recording of a training run."""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any

from lightning_trak.checks import require_bool
from lightning_trak.replay.recording.flat_states import FlatState, pack_states
from lightning_trak.replay.recording.reading import FORMAT_VERSION, read_manifest, stop_of
from lightning_trak.replay.recording.records import StepRecord, pack_steps
from lightning_trak.replay.recording.spacing import Spacing
from lightning_trak.replay.recording.states import TrainingState
from lightning_trak.running.threads import compute_threads
from lightning_trak.storage.files import json_text, remove_leftovers, save_tensors, write_atomically
from lightning_trak.storage.locks import Lock, hold
from lightning_trak.storage.manifests import MANIFEST
from lightning_trak.storage.paths import local_directory
from lightning_trak.storage.schemas import with_checksum

# What is recorded waits in memory up to the first of these sizes, and the first file up to the second. In between, a
# quarter of what was written waits. So little is left to write when training ends, and files are few.
BUFFER_BYTES, _FIRST_BYTES, _WAITING = 1 << 26, 1 << 22, 4


@dataclass
class _Batch:
    """What becomes a file.

    Attributes:
        steps: records of steps.
        states: full states, by the step that they are before.
        nbytes: the size of all.
    """

    steps: list[StepRecord] = field(default_factory=list)
    states: dict[int, FlatState] = field(default_factory=dict)
    nbytes: int = 0


class RecordingWriter:
    """Writes a recording. Steps and states wait in memory until they are large, or until :meth:`flush`.

    Those that have become large are written in a thread while training goes on. What goes wrong there is raised by the
    next call, and the steps and states are kept for another attempt.

    Args:
        directory: the directory, on a disk.
        spacing: the spacing of full states, noted in the manifest.
    """

    def __init__(self, directory: str | os.PathLike[str], spacing: Spacing) -> None:
        self.path = local_directory(directory, "recording")
        self._spacing = spacing
        self._lock: Lock | None = None
        self._manifest: dict[str, Any] = {}
        self._content = b""  # of the manifest's file
        self._writing: tuple[Future[None], _Batch] | None = None
        self._clear()

    def _clear(self) -> None:
        """Begin to collect the steps and states that follow those of the manifest."""
        self._waiting = _Batch()
        self._spare: list[FlatState] = []  # written states, whose memory is used again
        self._written = 0  # bytes
        self._num_steps = stop_of(self._manifest)
        self._state_steps = {step for part in self._manifest.get("parts", ()) for step in part["states"]}

    @property
    def num_steps(self) -> int:
        """The number of steps so far, those in memory included."""
        return self._num_steps

    def begin(
        self, run: dict[str, Any], environment: dict[str, Any], start: str | None = None, overwrite: bool = False
    ) -> str:
        """Start the recording of a new run, and hold the directory until :meth:`close`.

        Args:
            run: what is trained, see :attr:`Recording.run`.
            environment: versions and hardware.
            start: the identifier of all runs that start from the same state, if such a run may take the directory of
                another one; None: the run gets an identifier of its own.
            overwrite: whether to delete the recording of another run.

        Returns:
            The run's identifier.

        Raises:
            ValueError: if the directory holds a recording already, or another run is writing to it.
        """
        require_bool("overwrite", overwrite)
        self._hold()
        existing = self._existing()
        identifier = uuid.uuid4().hex if start is None else start
        others = [] if existing is None else existing["parts"]
        if existing is not None and others and existing["id"] != start and not overwrite:
            self.close()
            raise ValueError(self._occupied(existing))
        if others and self._lock is None:
            self.close()
            raise ValueError(
                f'"{self.path}" is on a file system without locks, so that nobody can tell whether another run writes'
                " there; delete its recording yourself, or use another directory"
            )
        self._start(identifier, run, [environment | {"first": 0}], [])
        for part in others:
            (self.path / part["file"]).unlink(missing_ok=True)
        return identifier

    def resume(self, runs: Sequence[str], step: int, run: dict[str, Any], environment: dict[str, Any]) -> str:
        """Continue the recording of a run before a step, and hold the directory until :meth:`close`.

        What was recorded of later steps is removed from the manifest.

        Args:
            runs: identifiers that the run may have.
            step: the steps that the resumed run has taken.
            run: what is trained. It must be the same as before.
            environment: versions and hardware.

        Raises:
            ValueError: if the directory holds the recording of another run, lacks some of the steps, or was made with
                something else; or if another run is writing to it.
        """
        self._hold()
        try:
            existing = self._existing()
            if existing is None or not existing["parts"]:
                raise ValueError(
                    f'training continues at step {step}, but "{self.path}" holds no recording of the steps before it;'
                    " record a run from its first step, or continue with the directory of its recording"
                )
            if existing["id"] not in runs:
                raise ValueError(self._occupied(existing))
            if stop_of(existing) < step:
                raise ValueError(
                    f'training continues at step {step}, but "{self.path}" has only {stop_of(existing)} steps;'
                    " continue from an earlier checkpoint, and list TrainingRecorder before callbacks that save one"
                )
            for name, before in existing["run"].items():
                if before != run[name]:
                    raise ValueError(
                        f'recording "{self.path}" was made with another {name} than this run has; continue the run'
                        f" with the same {name}, or record a new run in another directory"
                        + ("" if name == "parameters" else f" (recorded: {before}; now: {run[name]})")
                    )
        except BaseException:
            self.close()
            raise
        parts = [
            part | {"stop": min(part["stop"], step), "states": [kept for kept in part["states"] if kept <= step]}
            for part in existing["parts"]
            if part["first"] < step or (part["first"] == part["stop"] <= step)
        ]
        environments = [one for one in existing["environments"] if one["first"] < step]
        self._start(existing["id"], run, [*environments, environment | {"first": step}], parts)
        return str(existing["id"])

    def has_state(self, step: int) -> bool:
        """Whether there is a full state before a step."""
        return step in self._state_steps

    def add_step(self, step: StepRecord) -> None:
        """Add the record of the next step."""
        self._waiting.steps.append(step)
        self._num_steps += 1
        nbytes = 0
        for batch in step.micro_batches:
            nbytes += 8 * len(batch.positions)
            for state in batch.random_states.values():
                nbytes += state.nbytes
        self._added(nbytes)

    def add_state(self, state: TrainingState) -> None:
        """Add a copy of the full state before the next step."""
        flat = FlatState.of(state, self._spare.pop() if self._spare else None)
        self._waiting.states[self._num_steps] = flat
        self._state_steps.add(self._num_steps)
        self._added(flat.nbytes)

    def _added(self, nbytes: int) -> None:
        self._waiting.nbytes += nbytes
        if self._writing is not None and self._writing[0].done():
            self._settle()
        if self._waiting.nbytes > min(BUFFER_BYTES, max(_FIRST_BYTES, self._written // _WAITING)):
            self._settle()
            thread = compute_threads(1)  # for this file only: an idle thread would be there when workers are forked
            self._writing = thread.submit(self._write, self._waiting), self._waiting
            thread.shutdown(wait=False)
            self._waiting, self._spare = _Batch(), []

    def _settle(self) -> None:
        """Wait for the thread, and raise its error."""
        if self._writing is None:
            return
        future, batch = self._writing
        wait([future])
        self._writing = None
        error = future.exception()
        if error is not None:
            later = self._waiting
            self._waiting = _Batch(batch.steps + later.steps, batch.states | later.states, batch.nbytes + later.nbytes)
            raise error
        self._spare = list(batch.states.values())

    def flush(self, finished: bool = False) -> None:
        """Write what waits in memory.

        Args:
            finished: whether training has ended.

        Raises:
            ValueError: if another run has taken the directory.
            OSError: if it cannot be written. What was written earlier is not changed.
        """
        self._settle()
        if self._manifest and (self._waiting.steps or self._waiting.states or finished):
            self._write(self._waiting, finished)
            self._waiting = _Batch()

    def _write(self, batch: _Batch, finished: bool = False) -> None:
        path = self.path / MANIFEST
        unchanged = path.exists() and path.read_bytes() == self._content
        if not unchanged and read_manifest(self.path)["writer"] != self._manifest["writer"]:
            raise ValueError(
                f'another run took "{self.path}" after this one began, so steps before {self.num_steps} were not'
                " recorded; give each run its own directory"
            )
        parts = list(self._manifest["parts"])
        try:
            if batch.steps or batch.states:
                parts.append(self._write_part(batch))
            self._replace(self._manifest | {"parts": parts, "finished": finished})
        except OSError as error:
            reason = (
                f'the recording "{self.path}" was not written: {error}; free some space or correct the permissions,'
                " then resume the run from a checkpoint: what was recorded earlier is complete"
            )
            raise (OSError(error.errno, reason) if error.errno else OSError(reason)) from error
        self._written += batch.nbytes

    def _write_part(self, batch: _Batch) -> dict[str, Any]:
        first = stop_of(self._manifest)
        stop = first + len(batch.steps)
        tensors, tables = pack_steps(batch.steps)
        states, layouts = pack_states(batch.states)
        file = f"part-{first:08d}-{stop:08d}.safetensors"
        digest = save_tensors(self.path / file, tensors | states, **tables, **layouts)
        return {"file": file, "sha256": digest, "first": first, "stop": stop, "states": sorted(batch.states)}

    def close(self) -> None:
        """Release the directory, so that another run may write to it."""
        try:
            self._settle()
        finally:
            self._manifest, self._spare = {}, []
            if self._lock is not None:
                self._lock.close()
                self._lock = None

    def _hold(self) -> None:
        if self._lock is None:
            self._lock = hold(self.path, str(self.path), "recordings")

    def _existing(self) -> dict[str, Any] | None:
        try:
            return read_manifest(self.path)
        except FileNotFoundError:
            return None

    def _occupied(self, manifest: dict[str, Any]) -> str:
        return (
            f'"{self.path}" holds the recording of another run, of {stop_of(manifest)} steps; use another directory,'
            " overwrite=True to delete it, or exist_ok=True in both runs if this one starts again from the same state;"
            " or continue that run with trainer.fit(ckpt_path=...) from a checkpoint that it saved"
        )

    def _start(
        self, identifier: str, run: dict[str, Any], environments: list[dict[str, Any]], parts: list[dict[str, Any]]
    ) -> None:
        remove_leftovers(self.path)
        self._replace(
            {
                "format": FORMAT_VERSION,
                "id": identifier,
                "writer": uuid.uuid4().hex,
                "spacing": self._spacing,
                "run": run,
                "environments": environments,
                "parts": parts,
                "finished": False,
            }
        )
        self._clear()

    def _replace(self, manifest: dict[str, Any]) -> None:
        content = json_text(with_checksum(manifest)).encode()
        write_atomically(self.path / MANIFEST, lambda temporary: temporary.write_bytes(content))
        self._manifest, self._content = manifest, content
