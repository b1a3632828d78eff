"""A module that trains on another loss than its output declares is warned of."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import TRAK
from lightning_trak.methods import Explicit, InfluenceFunction
from lightning_trak.outputs import (
    CausalLMLogLikelihood,
    CausalLMMargin,
    ClassificationMargin,
    MultiLabelMargin,
    NegativeLoss,
    RegressionOutput,
    SegmentationMargin,
)
from lightning_trak.projections import IdentityProjection
from tests.lit import TARGETS, TRAIN, LitNet, make_trainer

METHODS = {
    "TRAK": lambda module, store: TRAK(module, None, store, projection=IdentityProjection()),
    "influence": lambda module, store: InfluenceFunction(module, solver=Explicit(), damping=1.0),
}


class Trained(LitNet):
    """Minimizes what its class method says, of logits and labels."""

    def training_step(self, batch):
        return self.minimized(self(batch[0]), batch[1])

    def minimized(self, logits, labels):
        return F.cross_entropy(logits, labels)


class Sum(Trained):
    def minimized(self, logits, labels):
        self.log("loss", 1.0)
        return {"loss": F.cross_entropy(logits, labels, reduction="sum")}


class Factor(Trained):
    def minimized(self, logits, labels):
        return 3 * F.cross_entropy(logits, labels)


class ClassWeights(Trained):
    def minimized(self, logits, labels):
        return F.cross_entropy(logits, labels, weight=torch.tensor([1.0, 3.0, 9.0]))


class Smoothed(Trained):
    def minimized(self, logits, labels):
        return F.cross_entropy(logits, labels, label_smoothing=0.1)


class Second(Trained):
    def minimized(self, logits, labels):
        return F.cross_entropy(logits, labels) + logits.square().mean()


class Penalty(Trained):
    def minimized(self, logits, labels):
        return F.cross_entropy(logits, labels) + self.head.weight.square().sum()


class Noisy(Trained):
    def minimized(self, logits, labels):
        return F.cross_entropy(logits + torch.randn_like(logits), labels)


class NeedsTraining(Smoothed):
    def minimized(self, logits, labels):
        return super().minimized(logits, labels) * self.optimizers().param_groups[0]["lr"]


class NoLoss(Trained):
    def minimized(self, logits, labels):
        return None


class Manual(Smoothed):
    automatic_optimization = False


def found(method: str, module: nn.Module, tmp_path, train=TRAIN, batch_size: int = 8) -> tuple[Tensor, list[str]]:
    """Scores, and the warnings about the loss."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        made = METHODS[method](module, tmp_path / type(module).__name__)
        scores = made.attribute(make_trainer(), DataLoader(train, batch_size=batch_size), train)
    return scores, [str(item.message) for item in given if "another loss" in str(item.message)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [ClassWeights, Smoothed, Second, Penalty])
def test_another_loss_is_warned_of_once(kind, method, tmp_path):
    _, (message,) = found(method, kind(), tmp_path)
    assert message.startswith(f"training_step of {kind.__name__} minimizes another loss than that of Classification")
    assert "for 1 training example;" in message
    assert "for 8 training examples." in message


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [Trained, Sum, Factor, Noisy, NeedsTraining, NoLoss, Manual])
def test_nothing_is_said_of_the_same_loss_or_where_none_is_known(kind, method, tmp_path):
    assert found(method, kind(), tmp_path)[1] == []


def test_class_weights_cancel_in_batches_of_one(tmp_path):
    assert found("TRAK", ClassWeights(), tmp_path, batch_size=1)[1] == []
    assert len(found("TRAK", Smoothed(), tmp_path, batch_size=1)[1]) == 1


def test_losses_of_regressions_are_compared_up_to_a_factor(tmp_path):
    class Regression(LitNet):
        def __init__(self, loss):
            super().__init__()
            self.head, self.loss = nn.Linear(8, 1), loss

        def training_step(self, batch):
            return self.loss(self(batch[0]).squeeze(1), batch[1])

        def configure_model_output(self):
            return RegressionOutput()

    data = TensorDataset(TRAIN.tensors[0], 3 * torch.randn(len(TRAIN)))
    assert found("TRAK", Regression(F.mse_loss), tmp_path / "square", data)[1] == []
    assert len(found("TRAK", Regression(F.l1_loss), tmp_path / "absolute", data)[1]) == 1


class Several(LitNet):
    """Makes five predictions for an example, of three classes each."""

    def __init__(self, output, loss):
        super().__init__()
        self.head, self.declared, self.loss = nn.Linear(8, 15), output, loss

    def forward(self, inputs):
        return super().forward(inputs).unflatten(1, (3, 5))

    def configure_model_output(self):
        return self.declared

    def training_step(self, batch):
        return self.loss(self(batch[0]), batch[1])


class Labels(Several):
    def forward(self, inputs):
        return super().forward(inputs)[:, 0]


def warned(module, tmp_path, data) -> bool:
    """Whether featurize warns about the loss."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        METHODS["TRAK"](module, tmp_path).featurize(make_trainer(), data)
    return any("another loss" in str(item.message) for item in given)


def some_maps(classes: int) -> Tensor:
    """Labels of five predictions; in one example of two, two of them do not count."""
    labels = torch.randint(0, classes, (len(TRAIN), 5), generator=torch.Generator().manual_seed(0))
    labels[::2, 1:3] = -100
    return labels


def binary(logits, labels, **options):
    known = labels != -100
    return F.binary_cross_entropy_with_logits(logits[known], labels[known].float(), **options)


@pytest.mark.parametrize(
    ("kind", "output", "loss", "said"),
    [
        (Several, SegmentationMargin(), F.cross_entropy, False),
        (Several, SegmentationMargin(), lambda a, b: F.cross_entropy(a, b, weight=torch.tensor([1.0, 3.0, 9.0])), True),
        (Labels, MultiLabelMargin(), binary, False),
        (Labels, MultiLabelMargin("sum"), lambda a, b: binary(a, b, reduction="sum"), False),
        (Labels, MultiLabelMargin(), lambda a, b: binary(a, b, pos_weight=torch.tensor(9.0)), True),
    ],
)
def test_several_predictions_are_compared(kind, output, loss, said, tmp_path):
    data = TensorDataset(TRAIN.tensors[0], some_maps(3 if kind is Several else 2))
    assert warned(kind(output, loss), tmp_path, data) is said


@pytest.mark.parametrize(
    ("output", "shift"),
    [
        (CausalLMMargin(), 0),
        (CausalLMMargin(), 1),
        (CausalLMLogLikelihood(), 0),
        (CausalLMLogLikelihood(reduction="mean"), 0),
    ],
)
def test_losses_of_texts_are_compared(output, shift, tmp_path):
    """``shift``: training reads the labels at other places than the output does."""

    class Texts(Several):
        def __init__(self):
            super().__init__(output, None)
            self.head = nn.Embedding(9, 9)

        def forward(self, ids):
            return self.head(ids) * self.scale

        def training_step(self, batch):
            logits, labels = self(batch[0]), batch[1]
            return F.cross_entropy(logits[:, : 5 + shift].flatten(0, 1), labels[:, 1 - shift :].flatten())

    ids = torch.randint(0, 9, (len(TRAIN), 6), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[::2, 3:] = -100
    assert warned(Texts(), tmp_path, TensorDataset(ids, labels)) is bool(shift)


def test_a_given_loss_is_the_user_s_own(tmp_path):
    class Own(Smoothed):
        def configure_model_output(self):
            return NegativeLoss(lambda module, batch: F.cross_entropy(module(batch[0]), batch[1], reduction="none"))

    assert found("TRAK", Own(), tmp_path)[1] == []


@pytest.mark.parametrize("method", METHODS)
def test_what_the_step_does_to_the_copy_is_undone(method, tmp_path):
    class Average(Trained):
        def minimized(self, logits, labels):
            with torch.no_grad():
                for tensor in (*self.parameters(), self.scale):
                    tensor.data.mul_(0.5)
            self.train()
            self.calls = 1
            return super().minimized(logits, labels)

    torch.manual_seed(0)
    plain = Trained()
    average = Average()
    average.load_state_dict(plain.state_dict())
    assert torch.equal(found(method, average, tmp_path)[0], found(method, plain, tmp_path)[0])
    assert not hasattr(average, "calls")


def test_an_example_without_an_output_is_named_and_not_compared(tmp_path):
    labels = TRAIN.tensors[1].clone()
    labels[0] = -100  # which training leaves out
    trak = METHODS["TRAK"](Trained(), tmp_path / "store")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "training_step")
        with pytest.raises(ValueError, match="its label is -100"):
            trak.featurize(make_trainer(), TensorDataset(TRAIN.tensors[0], labels))


def test_targets_are_not_compared(tmp_path):
    trak = METHODS["TRAK"](Smoothed(), tmp_path / "store")
    with pytest.warns(UserWarning, match="minimizes another loss"):
        trak.featurize(make_trainer(), TRAIN)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trak.score(make_trainer(), TARGETS, output=ClassificationMargin(labels="predicted"))
