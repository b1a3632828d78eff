"""Snapshots in a training loop of Fabric: the same series as TRAKCallback writes in a Trainer."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import lightning_fabric
import pytest
import torch
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader

from lightning_trak import TRAKCallback
from lightning_trak.callbacks import FabricSnapshots
from lightning_trak.checkpoints.reading import resolve_checkpoints
from lightning_trak.checkpoints.series import SnapshotSeries
from tests.launch import run_together
from tests.lit import LitNet, make_data, make_trainer

EPOCHS, BATCHES = 2, 5


def make_net() -> LitNet:
    torch.manual_seed(0)
    return LitNet()


def set_up(compiled: bool = False, fabric: Any = None, **options: Any) -> tuple[Any, Any, Any]:
    fabric = fabric or Fabric(accelerator="cpu", devices=1)
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=1e-3, **options)
    return fabric, *fabric.setup(torch.compile(net, backend="eager") if compiled else net, optimizer)


def loader() -> DataLoader[Any]:
    return DataLoader(make_data(50), batch_size=10)


def train(fabric: Any, model: Any, optimizer: Any, snapshots: FabricSnapshots | None = None, first: int = 0) -> None:
    model.train()
    torch.manual_seed(first)  # of dropout
    for epoch in range(first, EPOCHS):
        for batch in loader():
            optimizer.zero_grad()
            fabric.backward(model.training_step(batch))
            optimizer.step()
        if snapshots is not None:
            snapshots.save(epoch=epoch + 1)


def states(directory: Path) -> list[dict[str, torch.Tensor]]:
    return [checkpoint.load() for checkpoint in resolve_checkpoints(directory)]


def same(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(tensor, others[name]) for name, tensor in some.items())


def recorded(directory: Path) -> list[dict[str, Any]]:
    entries = json.loads((directory / "manifest.json").read_text())["snapshots"]
    return [{name: value for name, value in entry.items() if name != "size"} for entry in entries]


@pytest.mark.parametrize("kind", ["plain", "compiled", "lightning_fabric"])
def test_the_series_is_the_one_that_a_trainer_writes(kind: str, tmp_path: Path) -> None:
    own = lightning_fabric.Fabric(accelerator="cpu", devices=1) if kind == "lightning_fabric" else None
    fabric, model, optimizer = set_up(kind == "compiled", own)
    with FabricSnapshots(fabric, tmp_path / "fabric", model, optimizer) as snapshots:
        train(fabric, model, optimizer, snapshots)

    torch.manual_seed(0)
    trainer = make_trainer(max_epochs=EPOCHS, callbacks=[TRAKCallback(tmp_path / "trainer")])
    net = make_net()
    torch.manual_seed(0)
    trainer.fit(net, loader())
    assert recorded(tmp_path / "fabric") == recorded(tmp_path / "trainer")  # checksums of the weights, too
    assert [entry["step"] for entry in recorded(tmp_path / "fabric")] == [BATCHES, 2 * BATCHES]


def test_what_is_recorded_is_of_the_last_step(tmp_path: Path) -> None:
    fabric, model, optimizer = set_up()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    with FabricSnapshots(fabric, tmp_path, model, optimizer) as snapshots:
        snapshots.save()  # the initial weights
        for epoch in range(EPOCHS):
            train(fabric, model, optimizer, first=EPOCHS - 1)
            scheduler.step()
            snapshots.save(epoch=epoch + 1)
            snapshots.save(epoch=epoch + 1)  # nothing has changed
    found = SnapshotSeries(tmp_path).read().snapshots
    assert [snapshot.step for snapshot in found] == [0, BATCHES, 2 * BATCHES]
    assert [snapshot.parameter_groups[0].lr for snapshot in found] == [0.1, 0.1, 0.05]
    assert found[0].parameter_groups[0].algorithm == "SGD"
    assert found[0].parameter_groups[0].parameters == tuple(name for name, _ in make_net().named_parameters())
    assert same(states(tmp_path)[0], make_net().state_dict())


def test_a_run_continues_from_a_checkpoint_of_fabric(tmp_path: Path) -> None:
    def begin(name: str) -> tuple[Any, dict[str, Any]]:
        fabric, model, optimizer = set_up()
        snapshots = FabricSnapshots(fabric, tmp_path / name, model, optimizer)
        return fabric, {"model": model, "optimizer": optimizer, "snapshots": snapshots}

    fabric, state = begin("run")
    with state["snapshots"] as snapshots:
        for epoch in range(EPOCHS):
            train(fabric, state["model"], state["optimizer"], first=EPOCHS - 1)
            snapshots.save(epoch=epoch + 1)
            if epoch == 0:
                fabric.save(tmp_path / "last.ckpt", state)
    whole = states(tmp_path / "run")

    fabric, state = begin("run")
    with (
        pytest.raises(ValueError, match=r"holds 2 snapshots of another run, .*fabric\.load of a state"),
        state["snapshots"],
    ):
        pass
    fabric.load(tmp_path / "last.ckpt", state)
    with state["snapshots"] as snapshots:
        assert [c.record.step for c in resolve_checkpoints(tmp_path / "run")] == [BATCHES]  # type: ignore[union-attr]
        snapshots.save(epoch=1)  # the step is there already
        train(fabric, state["model"], state["optimizer"], first=EPOCHS - 1)
        snapshots.save(epoch=2)
    again = states(tmp_path / "run")
    assert len(again) == 2
    assert all(same(some, others) for some, others in zip(whole, again, strict=True))


def test_a_checkpoint_of_fabric_is_read(tmp_path: Path) -> None:
    fabric, model, optimizer = set_up(compiled=True)
    train(fabric, model, optimizer)
    fabric.save(tmp_path / "last.ckpt", {"net": model, "optimizer": optimizer, "step": 10})
    (weights,) = states(tmp_path / "last.ckpt")  # type: ignore[arg-type]
    assert same(weights, model.module.state_dict())
    fabric.save(tmp_path / "both.ckpt", {"net": model, "teacher": make_net()})
    with pytest.raises(ValueError, match=r"several state dicts, under 'net', 'teacher': load it with torch\.load"):
        states(tmp_path / "both.ckpt")  # type: ignore[arg-type]


def test_the_preconditioner_is_kept(tmp_path: Path) -> None:
    fabric, net = Fabric(accelerator="cpu", devices=1), make_net()
    model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters()))
    with FabricSnapshots(fabric, tmp_path, model, optimizer, preconditioner=True) as snapshots:
        train(fabric, model, optimizer, snapshots)
    assert all(snapshot.preconditioner is not None for snapshot in SnapshotSeries(tmp_path).read().snapshots)
    fabric, model, optimizer = set_up()
    with pytest.raises(TypeError, match=r"needs torch\.optim.Adam or AdamW"):
        FabricSnapshots(fabric, tmp_path, model, optimizer, preconditioner=True)


def test_misuse_is_refused_before_training(tmp_path: Path) -> None:
    fabric, model, optimizer = set_up()
    with pytest.raises(TypeError, match="pass the optimizers"):
        FabricSnapshots(fabric, tmp_path, model)
    with pytest.raises(TypeError, match=r"model must be the module that fabric\.setup returned, got tuple"):
        FabricSnapshots(fabric, tmp_path, (model, optimizer), optimizer)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"optimizer 1 must be one that fabric\.setup returned, got dict"):
        FabricSnapshots(fabric, tmp_path, model, optimizer, {})  # type: ignore[arg-type]
    other = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"optimizer 0 \(SGD\) has no parameter of the model"):
        FabricSnapshots(fabric, tmp_path, model, other)
    assert not list(tmp_path.iterdir())

    snapshots = FabricSnapshots(fabric, tmp_path, model, optimizer)
    with pytest.raises(RuntimeError, match="call save inside with"):
        snapshots.save()
    with snapshots:
        with pytest.raises(ValueError, match="epoch must be the number of completed epochs, 0 or more, got -1"):
            snapshots.save(epoch=-1)
        with pytest.raises(RuntimeError, match="load the state before with"):
            snapshots.load_state_dict({"run": "a", "step": 3})
        with pytest.raises(RuntimeError, match="inside with already"), snapshots:
            pass
        with pytest.raises(ValueError, match="another run"), FabricSnapshots(fabric, tmp_path, model, optimizer):
            pass
    with FabricSnapshots(fabric, tmp_path, model, optimizer):  # the directory is free again, and no snapshot is in it
        pass


def test_an_error_in_training_releases_the_directory_and_the_optimizer(tmp_path: Path) -> None:
    fabric, model, optimizer = set_up()
    snapshots = FabricSnapshots(fabric, tmp_path, model, optimizer)
    snapshots.__enter__()
    train(fabric, model, optimizer, snapshots, first=EPOCHS - 1)
    snapshots.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    before = snapshots.state_dict()
    train(fabric, model, optimizer, first=EPOCHS - 1)
    assert snapshots.state_dict() == before  # steps outside with are not counted
    with snapshots:  # the same run goes on
        train(fabric, model, optimizer, snapshots, first=EPOCHS - 1)
    assert [snapshot.step for snapshot in SnapshotSeries(tmp_path).read().snapshots] == [BATCHES, 2 * BATCHES]


def test_weights_that_are_not_numbers_are_refused_before_training(tmp_path: Path) -> None:
    fabric, model, optimizer = set_up()
    model.module.register_buffer("odd", torch.eye(2).to_sparse())
    with (
        pytest.raises(TypeError, match=r"'odd' is a torch\.sparse_coo tensor"),
        FabricSnapshots(fabric, tmp_path, model, optimizer),
    ):
        pass


TOGETHER = """
import sys
from pathlib import Path

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak.callbacks import FabricSnapshots
from lightning_trak.checkpoints.series import SnapshotSeries
from tests.launch import leave_together

root = Path(sys.argv[1])

def shard(module, mesh):
    fully_shard(module[0], mesh=mesh["data_parallel"])
    return fully_shard(module, mesh=mesh["data_parallel"])

strategies = {
    "ddp": "ddp",
    "fsdp2": ModelParallelStrategy(shard, data_parallel_size=2, tensor_parallel_size=1),
}
for name, strategy in strategies.items():
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    if name == "ddp":
        model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    else:
        model = fabric.setup_module(net)
        optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1))
    data = torch.arange(32.0).view(8, 4) / 32
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(data), batch_size=2))
    own = root / f"{name}-{fabric.global_rank}"  # all ranks use that of rank zero
    with FabricSnapshots(fabric, own, model, optimizer) as snapshots:
        for epoch in range(2):
            for (inputs,) in loader:
                optimizer.zero_grad()
                fabric.backward(model(inputs).pow(2).mean())
                optimizer.step()
            snapshots.save(epoch=epoch + 1)
        write = SnapshotSeries._write_tensors
        def failing(self, *args):
            raise OSError(28, "No space left on device")
        SnapshotSeries._write_tensors = failing
        optimizer.step()
        try:
            snapshots.save(epoch=3)
        except OSError as error:
            (root / f"failure-{name}-{fabric.global_rank}").write_text(str(error))
        SnapshotSeries._write_tensors = write
leave_together()
"""


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    script = tmp_path / "together.py"
    script.write_text(textwrap.dedent(TOGETHER))
    run_together(script, tmp_path)
    for name in ("ddp", "fsdp2"):
        found = resolve_checkpoints(tmp_path / f"{name}-0")
        assert [c.record.step for c in found] == [2, 4]  # type: ignore[union-attr]
        assert not (tmp_path / f"{name}-1").exists()
        for rank in (0, 1):
            assert "was not saved" in (tmp_path / f"failure-{name}-{rank}").read_text()
    ddp, sharded = states(tmp_path / "ddp-0")[-1], states(tmp_path / "fsdp2-0")[-1]
    assert ddp.keys() == sharded.keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert all(torch.allclose(tensor, sharded[name], atol=1e-6) for name, tensor in ddp.items())
    manifest = SnapshotSeries(tmp_path / "fsdp2-0").read()
    assert manifest.snapshots[0].parameter_groups[0].parameters == ("0.weight", "0.bias", "2.weight", "2.bias")
