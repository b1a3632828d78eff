"""Metagradients of several tasks' outputs: their loss is that of training, or the training losses are given."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from lightning_trak import Metagradient
from lightning_trak.outputs import ClassificationMargin, DirectionOutput, MultiLabelMargin
from tests.replay.runs import Net, make_data, train

GENERATOR = torch.Generator().manual_seed(0)
TAGGED = TensorDataset(torch.randn(12, 4, generator=GENERATOR), torch.randint(0, 2, (12, 3), generator=GENERATOR))
TARGETS = TensorDataset(TAGGED.tensors[0][:3].flip(1), TAGGED.tensors[1][:3])


def losses(module, batch):
    return F.binary_cross_entropy_with_logits(module(batch[0]), batch[1].double(), reduction="none").mean(1)


class Tagger(Net):
    def training_step(self, batch, batch_idx):
        return losses(self, batch).mean()

    def configure_model_output(self):
        return MultiLabelMargin()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    directory, module = tmp_path_factory.mktemp("recorded"), Tagger()
    return module, directory, train(module, TAGGED, directory)


def attribute(recorded, **options):
    module, directory, trainer = recorded
    return Metagradient(module, directory, progress_bar=False, **options).attribute(trainer, TAGGED, TARGETS)


def test_the_loss_of_the_output_is_that_of_training(recorded):
    """Replay compares it with the recorded loss of each step."""
    scores = attribute(recorded)
    assert scores.abs().max() > 1e-3
    torch.testing.assert_close(scores, attribute(recorded, losses=losses))


def test_a_direction_with_the_training_losses(recorded):
    """The direction of one label's logit in the head is the difference of its margins."""
    direction = DirectionOutput("net.2", torch.tensor([1.0, 0, 0]), forward=lambda module, batch: module(batch[0]))
    scores = attribute(recorded, output=direction, losses=losses)
    one = MultiLabelMargin(forward=lambda module, batch: module(batch[0])[:, :1], labels_key=one_label)
    signs = 2.0 * TARGETS.tensors[1][:, :1] - 1
    torch.testing.assert_close(scores * signs, attribute(recorded, output=one, losses=losses))


def test_targets_have_another_output_than_training_examples(recorded):
    """The losses of training are those of its output, so that they need not be given."""
    module, directory, trainer = recorded
    direction = DirectionOutput("net.2", torch.tensor([1.0, -1, 0]), forward=lambda module, batch: module(batch[0]))
    expected = attribute(recorded, output=direction, losses=losses)
    method = Metagradient(module, directory, progress_bar=False)
    images = TensorDataset(TARGETS.tensors[0])
    torch.testing.assert_close(method.attribute(trainer, TAGGED, images, output=direction), expected)
    difference = ClassificationMargin(labels=0, against=1)
    torch.testing.assert_close(method.attribute(trainer, TAGGED, images, output=difference), expected)
    best = method.attribute(trainer, TAGGED, images, output=difference, aggregate="mean", top_k=2)
    torch.testing.assert_close(best.values, expected.mean(0, keepdim=True).topk(2).values)
    assert not torch.allclose(attribute(recorded), expected)


@pytest.mark.slow
def test_all_runs_explain_the_class_that_they_predict_together(tmp_path):
    modules, directories = [], [tmp_path / "first", tmp_path / "second"]
    for seed, directory in enumerate(directories):
        modules.append(Net())
        torch.manual_seed(seed)
        torch.nn.init.normal_(modules[-1].net[0].weight)
        trainer = train(modules[-1], make_data(), directory)
    images = torch.randn(30, 4, generator=torch.Generator().manual_seed(1)) * 2
    with torch.no_grad():
        found = torch.stack([module.double().eval()(images.double()).softmax(1) for module in modules])
    labels = found.mean(0).argmax(1)
    assert all((one.argmax(1) != labels).any() for one in found)
    method = Metagradient(Net(), directories, progress_bar=False, check_smooth=False)

    def explain(output):
        output.forward = lambda module, batch: module(batch[0])
        return method.attribute(trainer, make_data(), TensorDataset(images), output=output)

    expected = torch.stack([explain(ClassificationMargin(labels=label)) for label in range(3)])
    expected = expected[labels, torch.arange(30)]
    torch.testing.assert_close(explain(ClassificationMargin(labels="predicted")), expected)


def one_label(batch):
    return batch[1][:, :1]


def test_without_the_training_losses_it_is_refused(recorded):
    direction = DirectionOutput("net.2", torch.ones(3), forward=lambda module, batch: module(batch[0]))
    with pytest.raises(TypeError, match=r"DirectionOutput is an output of targets alone.*losses="):
        attribute(recorded, output=direction)


def test_a_target_needs_no_other_targets(tmp_path):
    module = Tagger(lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)))
    trainer = train(module, TAGGED, tmp_path)
    with pytest.raises(ValueError, match=r"Tagger has no output for one target alone.*track_running_stats=True"):
        attribute((module, tmp_path, trainer))
