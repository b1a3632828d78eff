"""Fleets that repeat a recorded run: against training by hand, together and alone, and what is refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_trak import LinearDatamodelingScore, Metagradient
from lightning_trak.replay import SmoothAdamW, metasmoothness, replay
from lightning_trak.retraining import ProponentRemoval, RecordedFleet, RetrainingFleet, random_removals, read_fleet
from tests.callback_nets import make_trainer
from tests.lit import LitNet
from tests.methods.metagradients import DATA, NETS, OPTIMIZERS, TARGETS, outputs
from tests.replay.runs import NUM_TRAIN, Net, make_data, shuffled, train

MASKS = random_removals(NUM_TRAIN, 5, fraction=0.2)


def fleet_of(directory: Path, module: Any, recording: Path, masks: Tensor = MASKS, **options: Any) -> RecordedFleet:
    data, targets = options.pop("train", DATA), options.pop("targets", TARGETS)
    return RecordedFleet(directory, module, recording, make_trainer(), data, targets, masks, **options)


def run(fleet: RecordedFleet, **options: Any) -> Tensor:
    fleet.run(progress_bar=False, **options)
    return fleet.outputs


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("recorded") / "recording"
    train(Net(optimizer=OPTIMIZERS["nesterov"]), DATA, directory)
    return directory


def test_members_are_the_run_without_some_losses(recorded: Path, tmp_path: Path) -> None:
    found = run(fleet_of(tmp_path, Net(), recorded))
    assert found.shape == (3, 5, 1)
    for number, mask in enumerate(MASKS):
        by_hand = Net(optimizer=OPTIMIZERS["nesterov"])
        by_hand.weights = mask.double()
        train(by_hand, DATA)
        torch.testing.assert_close(found[:, number, 0].double(), outputs(by_hand), rtol=1e-6, atol=1e-6)
    masks, again = read_fleet(tmp_path)
    assert torch.equal(masks, MASKS)
    assert torch.equal(again, found)


def smooth(module: Net) -> SmoothAdamW:
    return SmoothAdamW(module.parameters(), lr=0.01, eps_root=1e-4)


def without_dropout(module: nn.Module) -> nn.Module:
    for part in module.modules():
        if isinstance(part, (nn.Dropout, nn.MultiheadAttention)):
            setattr(part, "p" if isinstance(part, nn.Dropout) else "dropout", 0.0)
    return module


def pruned() -> nn.Module:
    """Its weights are computed from others, and kept on the layer with their graph."""
    layer = nn.utils.prune.l1_unstructured(nn.Linear(4, 5), "weight", 0.3)
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(5, 3))


RUNS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    **{net: (NETS[net], None, {}) for net in ("dropout", "batch norm", "group norm", "convolutions")},
    "tied weights": (NETS["tied, frozen and unused weights"], OPTIMIZERS["schedule"], {}),
    "attention": (lambda: without_dropout(NETS["attention"]()), OPTIMIZERS["amsgrad"], {}),
    "pruned weights": (pruned, None, {}),
    "groups": (None, OPTIMIZERS["groups"], {"gradient_clip_val": 0.3}),
    "paused momentum": (None, OPTIMIZERS["paused momentum"], {}),
    "accumulation": (None, smooth, {"accumulate_grad_batches": 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.filterwarnings("ignore:.*batch normalization.*", "ignore:.*performance drop.*")
def test_together_is_the_same_as_alone(name: str, tmp_path: Path) -> None:
    net, optimizer, options = RUNS[name]
    train(Net(net, optimizer), DATA, tmp_path / "recording", **options)
    alone = run(fleet_of(tmp_path / "alone", Net(net), tmp_path / "recording"))
    together = run(fleet_of(tmp_path / "together", Net(net), tmp_path / "recording"), together=3)
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)
    assert (alone - alone.mean(1, keepdim=True)).abs().max() > 1e-3


class Scheduled(Net):
    """Its batches depend on the mode and the epoch, and its loss on the learning rate."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] * (1 + self.current_epoch), *batch[1:]] if self.training else batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.losses(batch).mean()

    def losses(self, batch: Any) -> Tensor:
        rate = self.optimizers().param_groups[0]["lr"]
        return rate * F.cross_entropy(self(batch[0]), batch[1], reduction="none")


def test_members_together_know_mode_epoch_and_learning_rate(tmp_path: Path) -> None:
    train(Scheduled(optimizer=OPTIMIZERS["schedule"]), DATA, tmp_path / "recording")
    alone, together = (
        run(
            fleet_of(
                tmp_path / name,
                Scheduled(),
                tmp_path / "recording",
                losses=lambda module, batch: module.losses(batch),
            ),
            together=size,
        )
        for name, size in (("alone", None), ("together", 3))
    )
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)


def test_other_random_numbers_together_are_refused(tmp_path: Path) -> None:
    """Which numbers dropout within attention draws under vmap depends on the version of torch."""
    train(Net(NETS["attention"]), DATA, tmp_path / "recording")
    fleet, alone = (
        fleet_of(tmp_path / name, Net(NETS["attention"]), tmp_path / "recording") for name in ("fleet", "alone")
    )
    refusal = None
    try:
        fleet.run(together=5, progress_bar=False)
    except ValueError as error:
        refusal = str(error)
    if refusal is not None:
        assert re.search("first step of a member differs between .* leave together= out", refusal)
    else:  # the same numbers as one at a time
        alone.run(progress_bar=False)
        torch.testing.assert_close(fleet.outputs, alone.outputs)


def test_checkpointed_activations_together_are_refused(tmp_path: Path) -> None:
    class Checkpointed(nn.Sequential):
        def forward(self, inputs: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(super().forward, inputs, use_reentrant=False)

    def net() -> nn.Module:
        return Checkpointed(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    train(Net(net), DATA, tmp_path / "recording")
    with pytest.raises(ValueError, match=r"together cannot be differentiated: .* leave together= out"):
        fleet_of(tmp_path / "fleet", Net(net), tmp_path / "recording").run(together=5, progress_bar=False)


@pytest.mark.slow
def test_parts_and_interruptions_give_the_same_bits(recorded: Path, tmp_path: Path) -> None:
    whole = run(fleet_of(tmp_path / "whole", Net(), recorded), together=2)
    fleet = fleet_of(tmp_path / "other", Net(), recorded)
    fleet.run("1/1", together=2, progress_bar=False)
    members = sorted((tmp_path / "other" / "members").iterdir())
    members[1].unlink()
    members[3].unlink()
    with pytest.raises(RuntimeError, match="lacks 2 of 5 members"):
        _ = fleet.outputs
    with pytest.raises(RuntimeError, match="lacks 2 of 5 members"):
        read_fleet(tmp_path / "other")
    kept = members[0].stat().st_mtime_ns
    assert torch.equal(run(fleet_of(tmp_path / "other", Net(), recorded), together=2), whole)
    assert members[0].stat().st_mtime_ns == kept
    shared = [fleet_of(tmp_path / f"part{number}", Net(), recorded) for number in (1, 2)]
    for number, fleet in enumerate(shared):
        fleet.run((number + 1, 2), progress_bar=False)
    for path in (tmp_path / "part2" / "members").iterdir():
        shutil.copy(path, tmp_path / "part1" / "members")
    torch.testing.assert_close(shared[0].outputs, whole, rtol=1e-6, atol=1e-6)


def test_a_trained_module_is_the_same_as_a_new_one(tmp_path: Path) -> None:
    module = Net()
    before = torch.get_rng_state()
    train(module, DATA, tmp_path / "recording")
    torch.set_rng_state(before)
    first = run(fleet_of(tmp_path / "fleet", module, tmp_path / "recording"))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(run(fleet_of(tmp_path / "fleet", Net(), tmp_path / "recording")), first)


# --- mixed fleets ---------------------------------------------------------------------------------------------------


def elsewhere(monkeypatch: pytest.MonkeyPatch, **values: Any) -> None:
    from lightning_trak.running.environment import rounding_of

    monkeypatch.setattr(
        "lightning_trak.retraining.fleets.recorded.rounding_of", lambda device: rounding_of(device) | values
    )


@pytest.mark.parametrize("field", ["hardware", "torch", "device"])
def test_other_hardware_and_versions_are_refused(
    field: str, recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(fleet_of(tmp_path / "here", Net(), recorded))
    elsewhere(monkeypatch, **{field: "another"})
    with pytest.raises(ValueError, match=rf'{field} was ".*" and is "another"'):
        fleet_of(tmp_path / "here", Net(), recorded).run(progress_bar=False)
    other = fleet_of(tmp_path / "there", Net(), recorded)
    with pytest.warns(UserWarning, match=r"recorded with torch .* and is repeated with .*another"):
        other.run(progress_bar=False)
    shutil.copy(sorted((tmp_path / "there/members").iterdir())[2], tmp_path / "here/members")
    with pytest.raises(ValueError, match=rf'other hardware or by another version .*{field} was ".*" and is "another"'):
        read_fleet(tmp_path / "here")


def test_members_of_other_fleets_are_refused(recorded: Path, tmp_path: Path) -> None:
    run(fleet_of(tmp_path / "one", Net(), recorded))
    run(fleet_of(tmp_path / "two", Net(), recorded, ~MASKS))
    shutil.copy(sorted((tmp_path / "two/members").iterdir())[2], tmp_path / "one/members")
    with pytest.raises(ValueError, match="of another fleet; delete it"):
        read_fleet(tmp_path / "one")


def test_another_configuration_is_refused(recorded: Path, tmp_path: Path) -> None:
    run(fleet_of(tmp_path / "fleet", Net(), recorded))
    train(Net(), DATA, tmp_path / "recording")
    with pytest.raises(ValueError, match="another recording"):
        run(fleet_of(tmp_path / "fleet", Net(), tmp_path / "recording"))
    with pytest.raises(ValueError, match="other subsets"):
        run(fleet_of(tmp_path / "fleet", Net(), recorded, ~MASKS))
    with pytest.raises(ValueError, match="other targets data"):
        run(fleet_of(tmp_path / "fleet", Net(), recorded, targets=make_data(3, seed=6)))
    with pytest.raises(ValueError, match="losses"):
        run(fleet_of(tmp_path / "fleet", Net(), recorded, losses=lambda module, batch: module(batch[0])[:, 0]))
    with pytest.raises(ValueError, match="another directory"):
        RetrainingFleet(tmp_path / "fleet", LitNet, make_trainer, DATA, TARGETS, MASKS).run(progress_bar=False)


def test_what_does_not_fit_is_refused(recorded: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="have 13 examples, but those of the recording had 12"):
        fleet_of(tmp_path, Net(), recorded, train=make_data(13))
    with pytest.raises(ValueError, match="not those of the recording, judged by eight examples"):
        fleet_of(tmp_path, Net(), recorded, train=make_data(seed=7))
    with pytest.raises(ValueError, match="is not the module of the recording"):
        fleet_of(tmp_path, Net(lambda: nn.Linear(4, 3)), recorded)
    for masks in (MASKS.float(), MASKS[:, 1:], MASKS[0], MASKS[:0], torch.zeros(2, NUM_TRAIN, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"masks must be bool of shape \(num_subsets, 12\)"):
            fleet_of(tmp_path, Net(), recorded, masks)
    two = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False)
    with pytest.raises(ValueError, match=r"the Trainer has 2 processes, but one process trains a member"):
        RecordedFleet(tmp_path, Net(), recorded, two, DATA, TARGETS, MASKS)
    with pytest.raises(FileNotFoundError, match="is not a directory that TrainingRecorder has written"):
        fleet_of(tmp_path, Net(), tmp_path)
    with pytest.raises(ValueError, match='part must be "i/n"'):
        fleet_of(tmp_path, Net(), recorded).run("3/2")
    with pytest.raises(ValueError, match="`together` to be a positive integer"):
        fleet_of(tmp_path, Net(), recorded).run(together=0)
    with pytest.raises(ValueError, match="training_step returned"):
        fleet_of(tmp_path, Net(), recorded, losses=lambda module, batch: module(batch[0]).square().sum(1)).run(
            progress_bar=False
        )
    assert not list((tmp_path / "members").glob("*"))


def test_batch_normalization_is_said(tmp_path: Path) -> None:
    train(Net(NETS["batch norm"]), DATA, tmp_path / "recording")
    fleet = fleet_of(tmp_path / "fleet", Net(NETS["batch norm"]), tmp_path / "recording")
    with pytest.warns(UserWarning, match="example with weight 0 is still part of the batch's statistics"):
        fleet.run(progress_bar=False)


def test_outputs_that_are_not_finite_fail_alone(recorded: Path, tmp_path: Path) -> None:
    targets = TensorDataset(torch.full((2, 4), torch.nan), torch.zeros(2, dtype=torch.int64), torch.zeros(2))
    for together in (None, 5):
        fleet = fleet_of(tmp_path / f"fleet-{together}", Net(), recorded, targets=targets)
        with pytest.raises(RuntimeError, match=r"5 of 5 members failed.*not finite at 2 targets, target 0 first"):
            fleet.run(together=together, progress_bar=False)


# --- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("fraction", [0.01, 0.1])
def test_metagradients_predict_the_run(fraction: float, tmp_path: Path) -> None:
    data, targets = make_data(200, seed=8), make_data(16, seed=9)
    loader = lambda data: shuffled(data, 20)  # noqa: E731
    train(Net(optimizer=OPTIMIZERS["sgd"]), data, tmp_path / "recording", loader=loader, max_epochs=3)
    masks = random_removals(200, 30, fraction)
    fleet = fleet_of(tmp_path / "fleet", Net(), tmp_path / "recording", masks, train=data, targets=targets)
    fleet.run(together=30, progress_bar=False)
    method = Metagradient(Net(), tmp_path / "recording", progress_bar=False)
    scores = method.attribute(make_trainer(), data, targets)
    lds = fleet.lds(scores)
    assert float(lds.compute()) > 0.9
    assert float(lds.interval()[0]) > 0.8
    by_hand = LinearDatamodelingScore(fleet.masks)
    by_hand.update(scores, fleet.outputs)
    assert torch.equal(lds.per_target(), by_hand.per_target())
    noise = torch.randn(scores.shape, generator=torch.Generator().manual_seed(0))
    assert float(fleet.lds(noise).compute()) < 0.4
    with pytest.raises(ValueError, match="Expected `scores` of shape"):
        fleet.lds(scores[:, 1:])
    with pytest.raises(ValueError, match="Expected finite `scores`"):
        fleet.lds(scores.clone().fill_(torch.nan))


@pytest.mark.slow
def test_without_the_top_examples(recorded: Path, tmp_path: Path) -> None:
    method = Metagradient(Net(), recorded, progress_bar=False)
    scores = {"metagradient": method.attribute(make_trainer(), DATA, TARGETS)}
    scores["opposite"] = -scores["metagradient"]

    def removal(scores: dict[str, Tensor], directory: str = "top", **options: Any) -> ProponentRemoval:
        return ProponentRemoval(
            tmp_path / directory, Net(), recorded, make_trainer(), DATA, TARGETS, scores, num_random=4, **options
        )

    first = removal(scores)
    with pytest.raises(RuntimeError, match="lacks 11 of 11 members"):
        first.effect()
    first.run(together=11, progress_bar=False)
    effect, loss = first.effect(), first.effect(of="loss")
    assert effect.removed == 1
    for target, row in enumerate(scores["metagradient"]):
        mask = torch.ones(NUM_TRAIN, dtype=torch.bool)
        mask[row.argmax()] = False
        outputs = run(fleet_of(tmp_path / f"target-{target}", Net(), recorded, torch.stack([mask, mask | True])))
        expected = outputs[target, 0, 0] - outputs[target, 1, 0]
        torch.testing.assert_close(effect.changes[0, target].float(), expected, rtol=1e-5, atol=1e-6)
    assert bool((effect.changes[0] < effect.random).all())
    assert bool((effect.changes[1] > effect.random).all())
    assert bool((loss.changes[0] > loss.random).all())
    mean, low, high = loss.beyond_random()
    assert bool((low <= mean).all())
    assert bool((mean <= high).all())
    assert float(mean[0]) == pytest.approx(float((loss.changes[0] - loss.random).mean()))
    assert [row[0] for row in effect.table().rows] == ["metagradient", "opposite", "random examples"]
    with pytest.raises(ValueError, match="of must be one of 'output', 'loss'; got"):
        first.effect(of="accuracy")
    with pytest.raises(ValueError, match='scores of "short" must have shape'):
        removal({"short": scores["opposite"][:, 1:]})
    with pytest.raises(ValueError, match='scores of "nan" are not finite in 36 places'):
        removal({"nan": scores["opposite"] * torch.nan})
    with pytest.raises(ValueError, match="other subsets"):
        removal({"opposite": scores["opposite"], "metagradient": scores["metagradient"]}).run(progress_bar=False)
    for fraction in (0.0, 1.0, 0.99):
        with pytest.raises(ValueError, match="expected a fraction"):
            removal(scores, fraction=fraction)
    with pytest.raises(TypeError, match=r"scores must be a dict of the scores of each method, .* got a Tensor"):
        removal(scores["opposite"])
    with pytest.raises(ValueError, match="expected the scores of some methods, got none"):
        removal({})


def test_without_a_trainer(recorded: Path, tmp_path: Path) -> None:
    options = {"progress_bar": False}
    assert replay(Net(), recorded, None, DATA, **options).identical
    assert metasmoothness(Net(), recorded, None, DATA, TARGETS, repeats=1, **options).smooth
    fleet = RecordedFleet(tmp_path / "fleet", Net(), recorded, None, DATA, TARGETS, MASKS[:1])
    torch.testing.assert_close(run(fleet), run(fleet_of(tmp_path / "again", Net(), recorded, MASKS[:1])))
    scores = {"none": torch.zeros(3, NUM_TRAIN)}
    ProponentRemoval(tmp_path / "top", Net(), recorded, None, DATA, TARGETS, scores, num_random=1)
    with pytest.raises(
        TypeError, match=r"expected a Trainer of Lightning first, got an object of torch\.utils\.data\.dataset\.TensorD"
    ):
        replay(Net(), recorded, DATA, DATA, **options)
    with pytest.raises(TypeError, match=r"`scores` as a torch\.Tensor, but got a topk"):
        fleet.lds(scores["none"].topk(2))
