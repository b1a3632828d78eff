"""TRAKCallback in two real processes, whole and sharded."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest
import torch

from lightning_trak.checkpoints.reading import resolve_checkpoints
from tests.launch import run_together

pytestmark = pytest.mark.slow

DISTRIBUTED = """
    import json, os, sys
    from datetime import timedelta
    from pathlib import Path
    import lightning as L, torch
    from lightning.pytorch.strategies import ModelParallelStrategy
    from safetensors import SafetensorError
    from lightning_trak.callbacks.snapshots import TRAKCallback
    from lightning_trak.checkpoints.reading import resolve_checkpoints
    from lightning_trak.checkpoints.series import SnapshotSeries
    from tests.callback_nets import Net, loader
    from tests.launch import leave_together

    class Sharded(Net):
        def __init__(self):
            super().__init__()
            self.head.weight = torch.nn.Parameter(self.head.weight.contiguous())  # as FSDP needs it
        def configure_model(self):
            from torch.distributed.fsdp import fully_shard
            fully_shard(self, mesh=self.device_mesh["data_parallel"])

    root = Path(sys.argv[1])
    rank = int(os.environ.get("LOCAL_RANK", 0))
    save = SnapshotSeries.save
    def counted(self, *args):
        (root / f"wrote-{rank}").touch()
        return save(self, *args)
    SnapshotSeries.save = counted

    def fit(module, strategy, *callbacks):
        trainer = L.Trainer(accelerator="cpu", devices=2, strategy=strategy, max_epochs=2, logger=False,
                            enable_checkpointing=False, enable_progress_bar=False, callbacks=list(callbacks))
        trainer.fit(module, loader())

    # a directory that each rank spells differently, as with a time stamp: rank zero's counts
    epochs = TRAKCallback(root / f"epochs-{rank}")
    clocks = TRAKCallback(root / "time", train_time_interval=timedelta(0 if rank == 0 else 1))
    module = Net()
    fit(module, "ddp", epochs, clocks)
    seen = {name: [c.record.step for c in resolve_checkpoints(root / name)] for name in ("epochs-0", "time")}
    torch.save(module.state_dict(), root / f"final-{rank}.pt")

    try:  # every rank must meet the refusal, not wait for the one that saw it
        fit(Net(), "ddp", TRAKCallback(root / "time"))
    except ValueError as error:
        seen["refusal"] = str(error)

    class Unportable(Exception):  # made of other arguments than it keeps, so that it cannot be unpickled
        def __init__(self, first, second):
            super().__init__(f"{first} {second}")
    errors = {
        "space": OSError(28, "No space left on device"),
        "header": SafetensorError("Error while serializing: HeaderTooLarge"),
        "unportable": Unportable("out", "of luck"),
    }
    write = SnapshotSeries._write_tensors
    for name, error in errors.items():
        def failing(self, file, *args, error=error):
            if file == "snapshot-00000004.safetensors":
                raise error
            return write(self, file, *args)
        SnapshotSeries._write_tensors = failing
        try:  # nor may any wait for the one that could not write
            fit(Net(), "ddp", TRAKCallback(root / name))
        except Exception as failure:
            seen[name] = [type(failure).__name__ if rank else "", str(failure)]
        SnapshotSeries._write_tensors = write
        seen[name] += [c.record.step for c in resolve_checkpoints(root / name)]

    fit(Sharded(), ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1), TRAKCallback(root / "sharded"))
    (root / f"rank-{rank}.json").write_text(json.dumps(seen))
    leave_together()
"""


def test_two_processes(tmp_path: Path) -> None:
    script = tmp_path / "distributed.py"
    script.write_text(textwrap.dedent(DISTRIBUTED))
    run_together(script, tmp_path)

    seen = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    failures = [[ranks.pop(name) for name in ("space", "header", "unportable")] for ranks in seen]
    assert seen[0] == seen[1]
    for rank, kinds in enumerate((["", "", ""], ["OSError", "OSError", "RuntimeError"])):
        assert [failure[0] for failure in failures[rank]] == kinds
        for failure, message in zip(failures[rank], ("No space left", "HeaderTooLarge", "out of luck"), strict=True):
            assert message in failure[1]
            assert failure[2:] == [2]  # what was saved before is whole
    assert 'snapshot-00000004.safetensors" was not saved' in failures[1][0][1]
    assert seen[0]["epochs-0"] == [2, 4]
    assert seen[0]["time"] == [1, 2, 3, 4]
    assert "holds 4 snapshots of another run" in seen[0]["refusal"]
    assert (tmp_path / "wrote-0").exists()
    assert not (tmp_path / "wrote-1").exists()
    assert not (tmp_path / "epochs-1").exists()

    final = torch.load(tmp_path / "final-0.pt")
    saved = resolve_checkpoints(tmp_path / "epochs-0")[-1].load()
    assert all(torch.equal(saved[name], final[name]) for name in final)
    # FSDP averages gradients as DDP does, so its gathered weights are the same
    sharded = resolve_checkpoints(tmp_path / "sharded")[-1].load()
    assert sharded.keys() == final.keys()
    for name in final:
        torch.testing.assert_close(sharded[name], final[name])
    groups = [resolve_checkpoints(tmp_path / name)[-1].record.parameter_groups for name in ("epochs-0", "sharded")]
    assert groups[0] == groups[1]
    assert groups[0][0].parameters == ("encode.weight", "norm.weight", "head.weight")
