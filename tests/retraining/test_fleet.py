"""Retraining fleets: every member is trained afresh, in full, and found again."""

import os
import random
import shutil
from typing import ClassVar

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Subset, WeightedRandomSampler, default_collate

from lightning_trak import LinearDatamodelingScore
from lightning_trak.outputs import ClassificationMargin, ContrastiveMargin, RegressionOutput
from lightning_trak.retraining import read_fleet
from lightning_trak.retraining.fleets.members import Member
from tests.lit import LitNet, make_data
from tests.lit import make_trainer as quiet_trainer
from tests.retraining.small_fleet import EPOCHS, LOADER, MASKS, TARGETS, TRAIN, N, files, make_fleet, make_trainer, run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole") / "fleet", num_seeds=2)


def flat(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


class Watched(LitNet):
    """Tells what happened to it."""

    log: ClassVar = []

    def on_fit_start(self):
        self.log.append({"first": flat(self), "batches": []})

    def on_train_batch_start(self, batch, batch_idx):
        self.log[-1]["batches"].append(batch[0])

    def on_train_end(self):
        self.log[-1] |= {"last": flat(self), "steps": self.trainer.global_step}


def test_every_fit_takes_all_its_steps_from_an_initialisation_of_its_own(tmp_path):
    Watched.log = []
    masks = torch.stack([*MASKS, torch.arange(N) < 11])
    fleet = run(tmp_path, Watched, masks=masks, num_seeds=2)
    assert len(Watched.log) == 8
    weights = [event["first"] for event in Watched.log] + [event["last"] for event in Watched.log]
    assert len({tuple(vector.tolist()) for vector in weights}) == 16  # nobody begins where another began or ended
    members = [Member(subset, repetition) for repetition in range(2) for subset in range(4)]
    seeds, orders = set(), set()
    for member, event in zip(members, Watched.log, strict=True):
        _, record = fleet.store.read(member)
        subset = masks[member.subset]
        steps = EPOCHS * -(-int(subset.sum()) // 4)
        assert event["steps"] == len(event["batches"]) == record["steps"] == steps
        assert record["epochs"] == EPOCHS
        seen = torch.cat(event["batches"]).chunk(EPOCHS)
        for epoch in seen:
            assert torch.equal(epoch.unique(dim=0), TRAIN.tensors[0][subset].unique(dim=0))
        orders |= {tuple(epoch.flatten().tolist()) for epoch in seen}
        seeds.add(record["seed"])
        torch.manual_seed(record["seed"])
        assert torch.equal(event["first"], flat(LitNet()))
    assert len(seeds) == 8
    assert len(orders) == 16


def test_a_member_is_what_a_user_would_train(whole):
    """The same by hand, from the seed that was written down; in eval mode, with batch statistics and dropout."""
    for member in (Member(0, 0), Member(2, 1)):
        outputs, record = whole.store.read(member)
        with torch.random.fork_rng():
            L.seed_everything(record["seed"], verbose=False)
            model = LitNet()
            subset = Subset(TRAIN, MASKS[member.subset].nonzero().flatten().tolist())
            make_trainer().fit(model, DataLoader(subset, batch_size=4, shuffle=True))
        expected = ClassificationMargin().output(model.eval(), TARGETS.tensors)
        torch.testing.assert_close(outputs, expected.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(outputs, whole.outputs[:, member.subset, member.repetition])


def test_the_result(whole):
    assert whole.outputs.shape == (7, 3, 2)
    assert whole.outputs.dtype == torch.float32
    lds = LinearDatamodelingScore(whole.masks)
    lds.update(torch.randn(7, N), whole.outputs)
    assert lds.compute().isfinite()
    masks, outputs = read_fleet(whole.directory)
    assert torch.equal(masks, MASKS)
    assert torch.equal(outputs, whole.outputs)


def test_outputs_do_not_depend_on_batches_of_targets(tmp_path, whole):
    other = run(tmp_path, targets=DataLoader(TARGETS, batch_size=2, shuffle=True, num_workers=1), num_seeds=2)
    torch.testing.assert_close(other.outputs, whole.outputs, rtol=1e-5, atol=1e-6)


def test_parts_in_any_order_on_disks_apart_are_merged_by_copying(tmp_path, whole):
    for folder, part in (("a", "3/4"), ("a", (1, 4)), ("b", "4/4"), ("b", "2/4")):
        make_fleet(tmp_path / folder, num_seeds=2).run(part, progress_bar=False)
    with pytest.raises(RuntimeError, match="lacks 3 of 6 members; run it to train them: subset 1, repetition 0; su"):
        read_fleet(tmp_path / "a")
    shutil.copytree(tmp_path / "b" / "members", tmp_path / "a" / "members", dirs_exist_ok=True)
    merged = make_fleet(tmp_path / "a", num_seeds=2)
    assert files(merged) == files(whole)
    assert torch.equal(merged.outputs, whole.outputs)


@pytest.mark.parametrize("part", ["0/3", "4/3", "3", "a/b", (1, 2, 3), 3])
def test_parts_that_do_not_exist(whole, part):
    with pytest.raises(ValueError, match="part must be"):
        whole.run(part)


def test_what_is_there_is_not_trained_again(tmp_path, whole):
    Watched.log = []
    fleet = run(tmp_path, Watched)
    assert len(Watched.log) == 3
    path = tmp_path / "members" / "subset-00001-seed-000.safetensors"
    path.unlink()
    run(tmp_path, Watched)
    assert len(Watched.log) == 4
    fleet = run(tmp_path, Watched, num_seeds=2)  # more repetitions of the same fleet
    assert len(Watched.log) == 7
    assert torch.equal(fleet.outputs, whole.outputs)
    path.write_bytes(path.read_bytes()[:-4] + b"1234")
    with pytest.raises(
        ValueError, match=r'seed-000\.safetensors" is truncated or altered.*delete it and run the fleet'
    ):
        _ = fleet.outputs


def test_everything_around_is_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    monkeypatch.delenv("PL_SEED_WORKERS", raising=False)

    class Bad(LitNet):
        def training_step(self, batch):
            raise ArithmeticError

    for module, error in ((LitNet, None), (Bad, RuntimeError)):
        torch.manual_seed(1), random.seed(2), np.random.seed(3)  # noqa: NPY002
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
        fleet = make_fleet(tmp_path / module.__name__, module)
        if error:
            with pytest.raises(error), pytest.warns(UserWarning, match="ArithmeticError"):
                fleet.run(retries=0)
        else:
            fleet.run()
        assert torch.equal(states[0], torch.get_rng_state())
        assert states[1] == random.getstate()
        assert (states[2] == np.random.get_state()[1]).all()  # noqa: NPY002
        assert os.environ["PL_GLOBAL_SEED"] == "5"
        assert "PL_SEED_WORKERS" not in os.environ


ONCE = {"module": LitNet(), "network": LitNet().head, "trainer": make_trainer(), "callback": EarlyStopping("loss")}


GENERATOR = torch.Generator()


class Wrapper(LitNet):
    def __init__(self):
        super().__init__()
        self.head = ONCE["network"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"make_module": lambda: ONCE["module"]}, r'the parameter "first.weight" of an earlier call'),
        (
            {"make_module": Wrapper},
            r'the parameter "head.weight" of an earlier call again.*make a new module and new net',
        ),
        ({"make_trainer": lambda: ONCE["trainer"]}, "the same Trainer that an earlier call returned"),
        (
            {"make_trainer": lambda: quiet_trainer(callbacks=[ONCE["callback"]])},
            "a Trainer with the same EarlyStopping",
        ),
        ({"make_loader": lambda data: DataLoader(data, generator=GENERATOR)}, "with the generator of an earlier call"),
    ],
)
def test_nothing_is_used_twice(tmp_path, options, match):
    fleet = make_fleet(tmp_path, **options)
    with pytest.raises(ValueError, match=match):
        fleet.run(progress_bar=False)
    assert not fleet.store.finished()
    assert not (tmp_path / "failures").exists()


def test_no_factory_and_no_hook_sets_the_seed(tmp_path):
    def same(made):
        L.seed_everything(7, verbose=False)
        return made

    class SameOrder(LitNet):
        def on_fit_start(self):
            torch.manual_seed(7)

    class Fixed(LitNet):
        """Its fixed random numbers leave the global state alone."""

        def on_fit_start(self):
            with torch.random.fork_rng():
                torch.manual_seed(7)

    seed = r"sets the random seed 7, .* repetitions would hide the noise of training; leave it out"
    for number, factories in enumerate(
        ({"make_module": lambda: same(LitNet())}, {"make_trainer": lambda: same(make_trainer())})
    ):
        for of_the_fleet in (0, 7):
            with pytest.raises(ValueError, match=seed):
                run(tmp_path / f"{number}-{of_the_fleet}", seed=of_the_fleet, **factories)
    for number, late in enumerate(
        ({"make_loader": lambda data: same(DataLoader(data, batch_size=4))}, {"make_module": SameOrder})
    ):
        fleet = make_fleet(tmp_path / f"late-{number}", **late)
        with pytest.raises(ValueError, match=seed):
            fleet.run(progress_bar=False)
        assert not fleet.store.finished()
        assert not (fleet.directory / "failures").exists()
    assert len(run(tmp_path / "fixed", Fixed, masks=MASKS[:1]).outputs)


class Transposed(ClassificationMargin):
    def output(self, module, batch):
        return super().output(module, batch)[:, None]


class Mean(ClassificationMargin):
    def output(self, module, batch):
        return super().output(module, batch).mean(0)


class Short(ClassificationMargin):
    def output(self, module, batch):
        return super().output(module, batch)[1:]


@pytest.mark.parametrize(("output", "shape"), [(Transposed(), r"\(4, 1\)"), (Mean(), r"\(\)"), (Short(), r"\(3,\)")])
def test_an_output_that_is_not_one_number_a_target_stops_the_fleet(tmp_path, output, shape):
    fleet = make_fleet(tmp_path, targets=DataLoader(TARGETS, batch_size=4), output=output)
    with pytest.raises(ValueError, match=rf"returned shape {shape} for the first of 2 batches of 7 targets; expected"):
        fleet.run(progress_bar=False)
    assert not fleet.store.finished()


def test_batches_of_a_batch_sampler_are_those_of_a_loader(whole, tmp_path):
    batches = BatchSampler(RandomSampler(TRAIN), batch_size=4, drop_last=False)
    assert torch.equal(
        run(tmp_path / "fleet", train=DataLoader(TRAIN, batch_sampler=batches)).outputs, whole.outputs[..., :1]
    )


WEIGHTED = WeightedRandomSampler([1.0] * N, N)


def backwards(items):
    return default_collate(items[::-1])


def used_trainer():
    trainer = make_trainer()
    trainer.fit(LitNet(), LOADER)
    return trainer


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"make_trainer": used_trainer}, ValueError, "a Trainer that an earlier call has used"),
        ({"make_trainer": lambda: quiet_trainer(devices=2)}, ValueError, r'2 processes.*devices=1.*run\(part="1/2"\)'),
        ({"make_trainer": lambda: quiet_trainer(fast_dev_run=True)}, ValueError, "fast_dev_run, which .* first"),
        ({"make_trainer": lambda: quiet_trainer(overfit_batches=1)}, ValueError, "overfit_batches, which .* no ground"),
        ({"make_module": LitNet()}, TypeError, "make_module must be a function that makes a new .* got a LitNet"),
        ({"make_trainer": make_trainer()}, TypeError, "make_trainer must be a function .* got a Trainer"),
        ({"make_trainer": LitNet}, ValueError, r"make_trainer\(\) must return a Trainer, got LitNet"),
        ({"make_module": lambda: torch.nn.Linear(2, 2)}, ValueError, "must return a LightningModule, got Linear"),
        ({"masks": MASKS.int()}, ValueError, r"masks must be bool of shape \(num_subsets, 20\).*got int32"),
        ({"masks": MASKS[:, :9]}, ValueError, r"got bool of shape \(3, 9\)"),
        (
            {"masks": MASKS & (torch.arange(3) > 0)[:, None]},
            ValueError,
            r"got subsets of sizes \[0, 10",
        ),
        ({"num_seeds": 0}, ValueError, "`num_seeds` to be a positive integer but got 0"),
        ({"num_seeds": 1.5}, ValueError, "`num_seeds` to be a positive integer but got 1.5"),
        ({"seed": -1}, ValueError, "seed must be a whole number from 0 to 4294967294, got -1"),
        ({"seed": None}, ValueError, "seed must be a whole number .*, got None"),
        ({"keep_weights": "no"}, TypeError, "keep_weights must be True or False; got 'no'"),
        ({"make_loader": lambda subset: subset}, ValueError, r"make_loader\(\) must return a DataLoader, got Subset"),
        ({"make_loader": lambda _: LOADER}, ValueError, r"make_loader\(\) returned a loader of the whole training set"),
        ({"train": [1, 2]}, TypeError, "train must be a map-style Dataset or a DataLoader, got list"),
        ({"targets": L.LightningDataModule()}, TypeError, "must be a .* pass what its dataloader methods return"),
        ({"train": DataLoader(TRAIN, 4, sampler=WEIGHTED)}, ValueError, "make_loader="),
        ({"train": DataLoader(TRAIN, batch_sampler=BatchSampler(WEIGHTED, 4, False))}, ValueError, "make_loader="),
        (
            {"targets": DataLoader(TARGETS, 4, collate_fn=backwards)},
            ValueError,
            "targets changes the order of the",
        ),
        ({"output": F.relu}, TypeError, "must be a ModelOutput, got function"),
        ({"output": ClassificationMargin(labels="predicted")}, TypeError, "may be about another class at each of them"),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path, options, error, match):
    with pytest.raises(error, match=match):
        make_fleet(tmp_path / "fleet", **options)
    assert not (tmp_path / "fleet").exists()


def other_masks():
    masks = MASKS.clone()
    masks[2] = ~masks[2]
    return masks


class Wide(LitNet):
    def __init__(self):
        super().__init__(width=9)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"seed": 1}, "made with seed 0, this one has seed 1; use another directory or the same seed"),
        ({"masks": other_masks()}, r"made with other subsets, this one has subsets of the same shape \(3, 20\)"),
        ({"masks": MASKS[:2]}, "made with num_subsets 3, this one has num_subsets 2"),
        ({"train": DataLoader(make_data(N, seed=5), batch_size=4)}, "made with other train data of this size"),
        ({"targets": make_data(7, seed=9)}, "made with other targets data of this size"),
        ({"targets": make_data(8)}, "made with num_targets 7"),
        (
            {"output": RegressionOutput()},
            "made with another output, this one has one that differs: class was .*Class.*Margin",
        ),
        ({"make_module": Wide}, "other parameters, this one has one that differs in first.weight, first.bias"),
        ({"make_trainer": lambda: quiet_trainer(max_epochs=3)}, "made with max_epochs 2, this one has max_epochs 3"),
        ({"train": TRAIN}, "made with batch_size 4, this one has batch_size 32"),
    ],
)
def test_another_fleet_in_the_same_place_is_refused(whole, options, match):
    before = files(whole)
    with pytest.raises(ValueError, match=match):
        make_fleet(whole.directory, **options).run()
    assert files(whole) == before


class LitPair(L.LightningModule):
    """Embeds pairs; what is compared with them are all training pairs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 4), torch.nn.Linear(6, 4)

    def forward(self, first, second):
        return self.first(first), self.second(second)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0], batch[0].roll(1, -1)

    def training_step(self, batch):
        first, second = self(*batch)
        return F.cross_entropy(first @ second.T, torch.arange(len(first)))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_end(self):
        LitPair.last = self

    def predict_step(self, batch):
        raise AssertionError("the output is not what predict_step gives")


def test_an_output_with_a_context_and_the_modules_own_transfer_hooks(tmp_path):
    output = ContrastiveMargin(context_size=N)
    fleet = run(tmp_path, LitPair, masks=MASKS[:1], output=output)
    assert output._bank is None, "the user's output is left alone"
    train, targets = ((data.tensors[0], data.tensors[0].roll(1, -1)) for data in (TRAIN, TARGETS))
    with torch.no_grad():
        output.set_context(output.make_context(LitPair.last, [train]))
        expected = output.output(LitPair.last, targets)
    torch.testing.assert_close(fleet.outputs[:, 0, 0], expected, rtol=1e-5, atol=1e-5)
