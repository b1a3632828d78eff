"""Trains in child processes, kills them with SIGKILL in the middle of file operations, and continues.

A script of its own: children are forked before torch has started any thread.
"""

import signal
import sys
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_trak.replay import Recording, replay
from lightning_trak.replay.recording import writing
from tests.callback_nets import make_trainer
from tests.killing import die_in_file_operation, run_forked
from tests.replay.runs import Net, make_data, train

CHECKPOINT = "checkpoints/last.ckpt"


def job(directory: Path, die_at: int | None) -> None:
    writing.BUFFER_BYTES = 300  # write a file every few steps
    resumed = (directory / CHECKPOINT).exists()
    die_in_file_operation(die_at)
    train(
        Net(optimizer=lambda module: torch.optim.Adam(module.parameters(), lr=0.01)).double(),
        make_data(),
        directory / "run",
        callbacks=[ModelCheckpoint(directory / "checkpoints", save_last=True)],
        loader=lambda data: DataLoader(data, batch_size=4),
        max_epochs=4,
        enable_checkpointing=True,
        ckpt_path=directory / CHECKPOINT if resumed else None,
    )


def main() -> None:
    root = Path(sys.argv[1])
    assert run_forked(job, root / "whole", None) == 0
    whole = dict(Recording(root / "whole/run").state(12).tensors())
    resumed = number = 0
    for number in range(19, 1000, 14):
        directory = root / str(number)
        code = run_forked(job, directory, number)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        if not (directory / CHECKPOINT).exists():  # nothing to continue
            continue
        resumed += 1
        assert run_forked(job, directory, number + 5) in (0, -signal.SIGKILL)  # killed again, perhaps
        assert run_forked(job, directory, None) == 0
        recording = Recording(directory / "run")
        recording.require_finished()
        found = dict(recording.state(12).tensors())
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
        trainer = make_trainer(precision="64-true")
        assert replay(Net(), directory / "run", trainer, make_data(), progress_bar=False).identical
    assert resumed > 1, resumed
    print("identical")


if __name__ == "__main__":
    main()
