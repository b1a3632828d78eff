"""Fleets whose members are trained at once, against fleets whose members are trained one by one."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, Sampler

from lightning_trak import AttributionMixin
from lightning_trak.outputs import ClassificationMargin, ContrastiveMargin
from lightning_trak.retraining import RetrainingFleet, random_subsets, train_together
from lightning_trak.retraining.fleets.members import Member
from tests.lit import make_data
from tests.lit import make_trainer as quiet_trainer

N, SEEDS = 24, 12
TRAIN, TARGETS = make_data(N), make_data(15, seed=1)
LOADER = DataLoader(TRAIN, batch_size=4)
MASKS = random_subsets(N, 3, seed=1)


class Net(AttributionMixin, L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, inputs):
        return self.net(inputs)

    def configure_model_output(self):
        return ClassificationMargin()

    def training_step(self, batch):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.3)


def make_trainer():
    return quiet_trainer(max_epochs=4)


def make_fleet(directory, make_module=Net, make_trainer=make_trainer, train=LOADER, masks=MASKS, **options):
    return RetrainingFleet(directory, make_module, make_trainer, train, TARGETS, masks, **options)


def z_scores(first, second):
    """Differences of means over seeds, in standard errors; ``(num_targets, num_subsets)``."""
    spread = (first.var(2) + second.var(2)) / SEEDS
    return (first.mean(2) - second.mean(2)) / spread.sqrt()


@pytest.mark.slow
def test_it_agrees_with_one_by_one_in_distribution(tmp_path):
    alone, together = (make_fleet(tmp_path / name, num_seeds=SEEDS) for name in ("alone", "together"))
    alone.run(progress_bar=False)
    together.run(together=20, progress_bar=False)
    first, second = alone.outputs, together.outputs
    assert not torch.equal(first, second)  # the order of the data is another
    z = z_scores(first, second)
    assert z.square().mean().sqrt() < 1.5
    assert z.abs().max() < 5
    assert 0.7 < (first.std(2).mean() / second.std(2).mean()) < 1.4
    # The measure can tell: members of other subsets differ.
    assert z_scores(first, second.roll(1, 1)).square().mean().sqrt() > 3


class Annealed(Net):
    """Its loss depends on epoch, step and batch; its schedule does not step each time."""

    def training_step(self, batch, batch_idx):
        factor = 1 + self.current_epoch + 0.1 * self.global_step + 0.3 * batch_idx
        return factor * super().training_step(batch) / 4

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedules = [
            {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.8), "interval": interval, "frequency": 2}
            for interval in ("step", "epoch")
        ]
        return [optimizer], schedules


class Shuffled(Sampler):
    """The order of an epoch that modules that are trained together have."""

    def __init__(self, mask, seed):
        self.positions, self.generator = mask.nonzero().flatten(), torch.Generator().manual_seed(seed)

    def __len__(self):
        return len(self.positions)

    def __iter__(self):
        yield from self.positions[torch.randperm(len(self), generator=self.generator)].tolist()


def test_a_step_knows_where_it_is_and_schedules_keep_their_frequency():
    seeds = [5, 7, 11]
    stack = train_together(Annealed, TRAIN, MASKS, seeds, max_epochs=5, batch_size=4)
    found = stack.outputs(ClassificationMargin(), list(TARGETS.tensors))
    for row, mask, seed in zip(found, MASKS, seeds, strict=True):
        torch.manual_seed(seed)
        module = Annealed()
        quiet_trainer(max_epochs=5).fit(module, DataLoader(TRAIN, 4, sampler=Shuffled(mask, seed)))
        expected = ClassificationMargin().output(module.eval(), TARGETS.tensors)
        torch.testing.assert_close(row, expected.detach(), rtol=1e-4, atol=1e-4)


class AsksTheTrainer(Net):
    def training_step(self, batch):
        return super().training_step(batch) / self.trainer.max_epochs


class Branches(Net):
    def training_step(self, batch):
        loss = super().training_step(batch)
        return loss if loss < 0.5 else 2 * loss


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (AsksTheTrainer, "uses self.trainer.max_epochs, which it does not have here; self.current_epoch"),
        (Branches, "cannot run many Branches at once: .*data-dependent control flow.* one at a time"),
    ],
)
def test_steps_that_need_more_than_is_there_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        train_together(make, TRAIN, MASKS, [1, 2, 3], max_epochs=1, batch_size=4)


def test_what_is_written_down(tmp_path):
    masks = torch.stack([MASKS[0], torch.arange(N) < 7, MASKS[1], MASKS[2]])  # two sizes
    fleet = make_fleet(tmp_path, masks=masks, num_seeds=2)
    fleet.run("1/2", together=2, progress_bar=False)
    assert len(fleet.store.finished()) == 4
    fleet.run(progress_bar=False)  # the rest one by one
    records = {member: fleet.store.read(member)[1] for member in fleet.store.finished()}
    assert sorted(record["together"] for record in records.values()) == [1, 1, 1, 1, 2, 2, 2, 2]
    assert len({record["seed"] for record in records.values()}) == 8
    assert records[Member(0, 0)]["steps"] == 4 * 3
    assert records[Member(1, 0)]["steps"] == 4 * 2
    assert fleet.outputs.isfinite().all()


def test_uneven_subsets_are_grouped_by_size(tmp_path):
    masks = torch.stack([MASKS[0], torch.arange(N) < 7, MASKS[1], torch.arange(N) > 16])
    fleet = make_fleet(tmp_path, masks=masks)
    fleet.run(together=4, progress_bar=False)
    assert [fleet.store.read(Member(subset, 0))[1]["together"] for subset in range(4)] == [2, 2, 2, 2]
    alone = make_fleet(tmp_path / "other", masks=masks[1:2])
    alone.run(together=1, progress_bar=False)


def test_a_member_that_diverges_fails_alone(tmp_path):
    train = make_data(N)
    bad = int((MASKS[0] & ~MASKS[1] & ~MASKS[2]).nonzero()[0])
    train.tensors[0][bad] = torch.inf
    fleet = make_fleet(tmp_path, train=DataLoader(train, batch_size=4))
    summary = r"1 of 3 members failed.*subset 0, repetition 0 \(failed 2x, ValueError: the output is not finite"
    with pytest.warns(UserWarning, match="failed"), pytest.raises(RuntimeError, match=summary):
        fleet.run(together=3, progress_bar=False)
    assert fleet.store.finished() == {Member(1, 0), Member(2, 0)}


def test_an_error_is_that_of_all_who_were_trained_at_once(tmp_path):
    class Failing(Net):
        repaired = False

        def training_step(self, batch):
            if self.global_step == 1 and not Failing.repaired:
                raise ValueError("the disk is full")
            return super().training_step(batch)

    fleet = make_fleet(tmp_path, Failing)
    with pytest.warns(UserWarning, match="failed"), pytest.raises(RuntimeError, match="3 of 3 members failed"):
        fleet.run(together=3, retries=0, progress_bar=False)
    assert "the disk is full" in fleet.store.failure(Member(2, 0))["traceback"]
    Failing.repaired = True
    fleet.run(progress_bar=False)
    assert fleet.outputs.isfinite().all()


def test_what_vmap_cannot_run_stops_the_fleet_and_can_be_trained_one_by_one(tmp_path):
    fleet = make_fleet(tmp_path, Branches)
    with pytest.raises(ValueError, match="cannot run many Branches at once"):
        fleet.run(together=3, progress_bar=False)
    fleet.run(progress_bar=False)
    assert fleet.outputs.isfinite().all()


class Clipping(Net):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
        pass


class Noisy(Dataset):
    """Examples with new noise each time."""

    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, position):
        inputs, label = self.examples[position]
        return inputs + torch.randn_like(inputs), label


def drawn(data, **options):
    return DataLoader(data, batch_size=4, sampler=RandomSampler(data, **options))


def limited(batches):
    return quiet_trainer(max_epochs=1, limit_train_batches=batches)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"make_module": Clipping},
            r"leaves out Clipping.configure_gradient_clipping; .* one at a time \(a fleet: run\(\) without",
        ),
        ({"make_trainer": lambda: quiet_trainer(max_epochs=1, gradient_clip_val=1.0)}, "gradient_clip_val=1.0 of the"),
        ({"make_trainer": lambda: quiet_trainer(max_steps=5)}, "max_steps=5 of the Trainer, max_epochs=-1 of the Tr"),
        ({"make_trainer": lambda: quiet_trainer(max_epochs=1, callbacks=[L.pytorch.callbacks.Timer()])}, "out Timer"),
        ({"train": DataLoader(TRAIN, batch_size=5, drop_last=True)}, "drop_last=True of the loader"),
        ({"make_trainer": lambda: limited(1)}, r"leaves out limit_train_batches=1 of the Trainer; train them one"),
        ({"make_trainer": lambda: limited(0.5)}, r"leaves out limit_train_batches=0\.5 of the Trainer; train them one"),
        ({"train": DataLoader(TRAIN, collate_fn=lambda items: items)}, "leaves out the loader's collate_fn"),
        ({"make_loader": lambda data: DataLoader(data, batch_size=4)}, "leaves out the order of SequentialSampler"),
        ({"make_loader": lambda data: DataLoader(Noisy(data), 4, shuffle=True)}, "the Noisy that make_loader makes of"),
        ({"make_loader": lambda data: drawn(data, replacement=True)}, "out replacement or num_samples of the Random"),
        ({"make_loader": lambda data: drawn(data, num_samples=5)}, "out replacement or num_samples of the RandomSampl"),
        ({"output": ContrastiveMargin(context_size=5)}, "ContrastiveMargin compares with training examples"),
    ],
)
def test_what_would_be_left_out_is_refused(tmp_path, options, match):
    fleet = make_fleet(tmp_path, **options)
    with pytest.raises(TypeError, match=match):
        fleet.run(together=3)
    assert not list(tmp_path.glob("failures/*"))


def test_random_augmentation_is_refused(tmp_path):
    fleet = make_fleet(tmp_path, train=DataLoader(Noisy(TRAIN), batch_size=4))
    with pytest.raises(ValueError, match=r"perhaps because of random augmentation.* load each item once.* together="):
        fleet.run(together=3, progress_bar=False)
    assert not list(tmp_path.glob("failures/*"))
    fleet.run(progress_bar=False)
    assert fleet.outputs.isfinite().all()


def test_an_output_that_is_not_one_number_a_target_stops_the_fleet(tmp_path):
    class Transposed(ClassificationMargin):
        def output(self, module, batch):
            return super().output(module, batch)[:, None]

    fleet = make_fleet(tmp_path, output=Transposed())
    with pytest.raises(ValueError, match=r"returned shape \(15, 1\) for .* expected one number per target"):
        fleet.run(together=3, progress_bar=False)


def test_a_module_is_not_given_twice_here_either(tmp_path):
    modules = iter([Net(), Net(), *[Net()] * 3])
    fleet = make_fleet(tmp_path, lambda: next(modules))
    with pytest.raises(ValueError, match="of an earlier call again"):
        fleet.run(together=3, progress_bar=False)
    for number in (0, True, 2.5):
        with pytest.raises(ValueError, match="`together` to be a positive integer"):
            fleet.run(together=number)


class Halves(Net):
    def on_before_optimizer_step(self, optimizer):
        for parameter in self.parameters():
            parameter.grad.mul_(0.5)


class OnPlateau(Net):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return [optimizer], [{"scheduler": scheduler, "monitor": "loss"}]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (Halves, "leaves out Halves.on_before_optimizer_step; train them one at a time"),
        (OnPlateau, r"a scheduler of OnPlateau monitors something \(ReduceLROnPlateau\)"),
    ],
)
def test_without_a_fleet_it_is_refused_too(make, match):
    with pytest.raises(TypeError, match=match):
        train_together(make, TRAIN, MASKS, [5, 7, 11], max_epochs=1, batch_size=4)


class Nesterov(Net):
    """With `foreach`, the optimizer changes the gradients in place."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, nesterov=True, foreach=True)


def test_an_optimizer_that_changes_gradients_is_compared_with_itself():
    stack = train_together(Nesterov, TRAIN, MASKS[:1], [5], max_epochs=2, batch_size=4)
    torch.manual_seed(5)
    module = Nesterov()
    quiet_trainer(max_epochs=2).fit(module, DataLoader(TRAIN, 4, sampler=Shuffled(MASKS[0], 5)))
    torch.testing.assert_close(stack.state_dicts()[0], dict(module.state_dict()), rtol=1e-4, atol=1e-5)
