"""Methods without gradients on what models and Trainers may be: in all precisions, with odd habits."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_trak.methods import DataShapley, KNNShapley, RepresentationSimilarity
from tests.lit import LitNet, make_checkpoints, make_data, make_model, make_trainer

TRAIN, TARGETS = make_data(30), make_data(8, seed=1)


def hidden(model: LitNet, inputs: Tensor) -> Tensor:
    """What the head of it is given, in float64."""
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    lower = F.linear(inputs.double(), weights["first.weight"], weights["first.bias"])
    mean, variance, eps = weights["norm.running_mean"], weights["norm.running_var"], model.norm.eps
    normal = (lower - mean) / (variance + eps).sqrt()
    return torch.tanh(normal * weights["norm.weight"] + weights["norm.bias"])


def matrix(targets: Tensor, train: Tensor, similarity: str) -> Tensor:
    """Each similarity by its definition."""
    targets, train = targets[:, None], train[None]
    if similarity == "l2":
        return -(targets - train).norm(dim=2)
    return F.cosine_similarity(targets, train, dim=2) if similarity == "cosine" else (targets * train).sum(2)


ROUNDING = {"32-true": 1e-6, "bf16-mixed": 1e-6, "64-true": 1e-6, "16-true": 2e-3, "bf16-true": 1e-2}


@pytest.mark.parametrize("precision", ROUNDING)
@pytest.mark.parametrize("similarity", ["dot", "cosine", "l2"])
def test_similarities_are_the_definitions_to_the_rounding_of_the_weights(precision, similarity):
    model = make_model()
    method = RepresentationSimilarity(model, [model.state_dict()], similarity=similarity)
    scores = method.attribute(make_trainer(precision=precision), TRAIN, TARGETS).double()
    expected = matrix(hidden(model, TARGETS.tensors[0]), hidden(model, TRAIN.tensors[0]), similarity)
    assert (scores - expected).norm() <= ROUNDING[precision] * expected.norm()


@pytest.mark.parametrize("precision", ROUNDING)
def test_shapley_values_add_up_in_every_precision(precision):
    """What all of the data is worth, less what nothing is, with modules trained in the same precision."""

    def trainer():
        return make_trainer(precision=precision, max_epochs=1)

    values = DataShapley(LitNet, trainer, permutations=1, step=10).attribute(trainer(), TRAIN, TARGETS)
    exact = DataShapley(LitNet, lambda: make_trainer(max_epochs=1), permutations=1, step=10)
    expected = exact.attribute(make_trainer(), TRAIN, TARGETS)
    rounding = {"bf16-mixed": 2e-2, "16-true": 2e-2, "bf16-true": 0.1}.get(precision, 1e-4)
    assert (values.sum(1) - expected.sum(1)).norm() <= rounding * expected.sum(1).norm()


def test_labels_that_half_precision_would_merge_are_refused():
    data, model = TensorDataset(TRAIN.tensors[0][:2], torch.tensor([257.0, 256.0])), make_model()
    method = KNNShapley(model, [model.state_dict()], k=1, forward=lambda module, batch: module(batch[0]))
    with pytest.raises(ValueError, match=r"the labels are torch.bfloat16.*give them as integers"):
        method.attribute(make_trainer(precision="bf16-true"), data, data)
    # Each is its own nearest neighbour, and alone in voting for its label.
    torch.testing.assert_close(method.attribute(make_trainer(), data, data), torch.eye(2))


class Closure(LitNet):
    def __init__(self) -> None:
        super().__init__()
        self.embed = lambda inputs: self.norm(self.first(inputs))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.embed(inputs))


class Noisy(LitNet):
    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(F.dropout(self.first(inputs), 0.1))


@pytest.mark.parametrize("method", [RepresentationSimilarity, KNNShapley])
def test_what_belongs_to_the_original_or_to_chance_is_refused(method):
    trainer, checkpoints = make_trainer(), make_checkpoints(1)
    with pytest.raises(
        ValueError, match=r"reads first.bias, first.weight, norm.bias and \d+ more of the module that was passed"
    ):
        method(Closure(), checkpoints).attribute(trainer, TRAIN, TARGETS)
    with pytest.raises(ValueError, match="the representation at state dict 0 is random in eval mode"):
        method(Noisy(), checkpoints).attribute(trainer, TRAIN, TARGETS)


class Encoder(nn.Module):
    """PyTorch has a fused path for it where nothing is differentiated, with zeros for padded positions."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, inputs: Tensor, keep: Tensor) -> Tensor:
        return self.head(self.encoder(inputs, src_key_padding_mask=~keep).mean(1))


@pytest.mark.filterwarnings("ignore:.*nested tensors.*")
def test_padded_rows_of_a_transformer_are_what_training_sees():
    generator = torch.Generator().manual_seed(0)
    keep = torch.arange(5) < torch.randint(1, 6, (12, 1), generator=generator)
    keep[0] = True
    data = TensorDataset(torch.randn(12, 5, 4, generator=generator), keep, torch.zeros(12))
    model = Encoder().eval()

    def forward(module, batch):
        return module(*batch[:2])

    found = []
    handle = model.head.register_forward_pre_hook(lambda _, args: found.append(args[0].detach()))
    forward(model, data.tensors)  # with gradients, so that nothing is fused
    handle.remove()
    method = RepresentationSimilarity(model, [model.state_dict()], similarity="dot", forward=forward)
    torch.testing.assert_close(method.attribute(make_trainer(), data, data), found[0] @ found[0].T)
