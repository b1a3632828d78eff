"""EK-FAC where it is exact, against its definition written out, and what it refuses. Against kronfluence: see peers."""

import copy

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_trak import AttributionMixin
from lightning_trak.gradients import HookEngine, LoopEngine
from lightning_trak.gradients.batch import ExampleBatch
from lightning_trak.methods import EKFACInfluence, Explicit, InfluenceFunction
from lightning_trak.outputs import ClassificationMargin, ModelOutput, RegressionOutput
from tests.lit import TARGETS, TRAIN, make_checkpoints, make_model, make_trainer


class Net(AttributionMixin, L.LightningModule):
    def __init__(self, *layers: nn.Module, output: ModelOutput | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(*layers)
        self.declared = output or ClassificationMargin()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)

    def configure_model_output(self) -> ModelOutput:
        return self.declared


def double_trainer() -> L.Trainer:
    return make_trainer(precision="64-true")


def ekfac(model: nn.Module, **options) -> Tensor:
    return EKFACInfluence(model, [model.state_dict()], **options).attribute(double_trainer(), TRAIN, TARGETS)


def test_one_layer_with_one_output_needs_no_approximation():
    """The Gauss-Newton matrix of linear regression is that of the inputs, and of the 1 that the bias belongs to."""
    torch.manual_seed(0)
    model = Net(nn.Linear(6, 1), output=RegressionOutput())
    data = [TensorDataset(part.tensors[0], part.tensors[1].float()) for part in (TRAIN, TARGETS)]
    expected = InfluenceFunction(model, [model.state_dict()], solver=Explicit(), damping=0.1)
    method = EKFACInfluence(model, [model.state_dict()], damping=0.1)
    scores = method.attribute(double_trainer(), *data)
    torch.testing.assert_close(scores, expected.attribute(double_trainer(), *data))


def test_one_hot_inputs_need_none_either():
    """With one-hot inputs, one example of each, every input has a block S of its own; EK-FAC has its diagonal in the
    basis of the whole, which is that of each block if all examples have the same outputs."""
    model = Net(nn.Linear(4, 3, bias=False))
    model.net[0].weight.data = torch.randn(3, 1, generator=torch.Generator().manual_seed(0)).expand(3, 4).clone()
    train = TensorDataset(torch.eye(4) * torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.zeros(4, dtype=torch.long))
    model.net[0].weight.data /= torch.tensor([1.0, 2.0, 3.0, 4.0])
    targets = TensorDataset(torch.randn(5, 4), torch.arange(5) % 3)
    expected = InfluenceFunction(model, [model.state_dict()], solver=Explicit(), damping=0.1)
    scores = EKFACInfluence(model, [model.state_dict()], damping=0.1).attribute(double_trainer(), train, targets)
    torch.testing.assert_close(scores, expected.attribute(double_trainer(), train, targets))


def definition(model: Net, curvature: str, damping: float) -> Tensor:
    """George et al. 2018 in NumPy, with autograd's gradients, one example and one layer at a time."""
    model = copy.deepcopy(model).double().eval()
    layers = [part for part in model.modules() if isinstance(part, nn.Linear)]
    inputs: dict[nn.Module, Tensor] = {}
    outputs: dict[nn.Module, Tensor] = {}
    for layer in layers:

        def keep(module, args, output):
            inputs[module], outputs[module] = args[0], output

        layer.register_forward_hook(keep)

    def examples(data):
        for x, y in data:
            value = model.declared.output(model, (x.double().unsqueeze(0), y.unsqueeze(0)))
            slopes = torch.autograd.grad(value, [outputs[layer] for layer in layers])
            sides = []
            for layer, slope in zip(layers, slopes, strict=True):
                a, s = (part.detach().reshape(-1, part.shape[-1]).numpy() for part in (inputs[layer], slope))
                sides.append((np.hstack([a, np.ones((len(a), 1))]) if layer.bias is not None else a, s))
            yield sides, [float(part) for part in model.declared.derivatives(value)]

    train, targets = list(examples(TRAIN)), list(examples(TARGETS))
    scores = np.zeros((len(targets), len(train)))
    for number in range(len(layers)):
        weights = [q**2 if curvature == "empirical" else r for _, (q, r) in train]
        a, s = zip(*(sides[number] for sides, _ in train), strict=True)
        gradients = [right.T @ left for left, right in zip(a, s, strict=True)]
        basis_a = np.linalg.eigh(sum(part.T @ part for part in a))[1]
        basis_s = np.linalg.eigh(sum(w * part.T @ part for w, part in zip(weights, s, strict=True)))[1]
        rotated = np.stack([basis_s.T @ gradient @ basis_a for gradient in gradients])
        eigenvalues = sum(w * part**2 for w, part in zip(weights, rotated, strict=True))
        inverse = 1 / (eigenvalues + damping * eigenvalues.mean())
        for t, (sides, _) in enumerate(targets):
            own = basis_s.T @ (sides[number][1].T @ sides[number][0]) @ basis_a
            for i, (_, (q, _)) in enumerate(train):
                scores[t, i] += (own * inverse * rotated[i]).sum() * q
    return torch.tensor(scores)


@pytest.mark.parametrize("curvature", ["gauss_newton", "empirical"])
def test_scores_are_the_definition_also_for_layers_with_positions(curvature):
    torch.manual_seed(0)
    model = Net(
        nn.Unflatten(1, (2, 3)), nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2, bias=False), nn.Flatten(), nn.Linear(4, 3)
    )
    scores = ekfac(model, curvature=curvature, damping=0.05)
    torch.testing.assert_close(scores, definition(model, curvature, 0.05), rtol=1e-6, atol=1e-9)


def test_layers_that_lie_the_other_way_round_give_the_same():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    model = Net(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    other = Net(conv1d(8, 6), nn.Tanh(), conv1d(3, 8))
    other.load_state_dict(
        {name: tensor.T if tensor.ndim == 2 else tensor for name, tensor in model.state_dict().items()}
    )
    torch.testing.assert_close(ekfac(other), ekfac(model))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 3, (2, 3), stride=(1, 2), padding=(1, 2), dilation=(2, 1)),
        nn.Conv2d(2, 3, 3, padding="same", padding_mode="circular"),
        nn.Conv1d(2, 4, 2, stride=2),
        nn.Conv3d(1, 2, 2, padding=1),
    ],
)
def test_the_factors_of_a_convolution_make_its_gradient(layer):
    torch.manual_seed(0)
    shape = {nn.Conv1d: (2, 6), nn.Conv2d: (2, 4, 5), nn.Conv3d: (1, 2, 3, 2)}[type(layer)]
    module, names = Net(copy.deepcopy(layer).double(), nn.Tanh(), nn.Flatten()), {"net.0.weight": "net.0.weight"}

    class Sum(ModelOutput):
        def output(self, module, batch):
            return module(batch).sum(1)

        def loss(self, output):
            return -output

    made = {}

    batch = torch.randn(3, *shape, dtype=torch.float64)
    HookEngine(module, Sum(), names).backward(
        ExampleBatch(batch, 3), lambda tracked, call: made.update(factors=tracked.layer.factors(call))
    )
    rows, columns = made["factors"]
    expected = LoopEngine(module, Sum(), names)(ExampleBatch(batch, 3))[1]["net.0.weight"]
    torch.testing.assert_close((rows.transpose(1, 2) @ columns).flatten(1), expected)


def test_neither_batches_nor_order_change_the_scores_and_the_module_is_left_alone():
    model = make_model().train()
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    method = EKFACInfluence(model, make_checkpoints(2), parameters=["first.*", "head.*"])
    expected = method.attribute(double_trainer(), TRAIN, TARGETS)
    train = DataLoader(TRAIN, batch_size=7, shuffle=True)
    scores = method.attribute(double_trainer(), train, DataLoader(TARGETS, batch_size=3))
    torch.testing.assert_close(scores, expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(part.training and not part._forward_hooks for part in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_parameters_that_are_left_out_are_named():
    model = make_model()
    with pytest.warns(UserWarning, match="leaves out 2 of 6 parameters.*norm.weight: norm .BatchNorm1d.: its gradient"):
        scores = ekfac(model)
    torch.testing.assert_close(scores, ekfac(model, parameters=["first.*", "head.*"]))
    with pytest.raises(ValueError, match=r"EK-FAC covers none of the selected parameters: norm.weight"):
        ekfac(model, parameters="norm.*")
    with pytest.warns(UserWarning, match="first.bias: first .Linear.: a bias without its weight"):
        ekfac(model, parameters=["first.bias", "head.*"])


class Tied(Net):
    def __init__(self, twice: bool) -> None:
        super().__init__(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
        if not twice:
            self.net[1].weight = self.net[0].weight
        self.twice = twice

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(self.net[0](inputs) if self.twice else inputs)


class Masked(Net):
    """The mean of a layer over the words of a text. The embedding of padding is not zero."""

    def __init__(self) -> None:
        super().__init__(nn.Embedding(9, 4), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self.net[0].requires_grad_(False)

    def forward(self, words: Tensor) -> Tensor:
        mask = (words > 0).unsqueeze(2)
        return (self.net(words) * mask).sum(1) / mask.sum(1)


def test_padding_does_not_count():
    def padded(rows: list[tuple[Tensor, int]]) -> list[Tensor]:
        words, labels = zip(*rows, strict=True)
        return [nn.utils.rnn.pad_sequence(words, batch_first=True), torch.tensor(labels)]

    torch.manual_seed(0)
    model = Masked()
    texts = [(torch.randint(1, 9, (length,)), length % 3) for length in (2, 9, 3, 7, 4, 2, 8, 5)]
    method = EKFACInfluence(model, [model.state_dict()])
    loaders = [DataLoader(texts, size, collate_fn=padded) for size in (1, 4)]
    alone, together = (method.attribute(double_trainer(), loader, loader) for loader in loaders)
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)


def test_weights_that_are_used_twice_are_not_covered():
    with pytest.warns(UserWarning, match="net.0.weight: net.1 .Linear.: it is tied"):
        ekfac(Tied(twice=False))
    with pytest.raises(ValueError, match=r"net.0 is called more than once"):
        ekfac(Tied(twice=True))


class Hidden(Net):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) + F.linear(inputs, self.net[0].weight)


def test_weights_that_are_used_outside_their_layer_are_an_error():
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"net.0.weight is also used outside its layer's forward"):
        ekfac(Hidden(nn.Linear(6, 3)))


def test_arguments_and_losses_without_curvature_are_refused():
    class Plain(RegressionOutput):
        def loss(self, output: Tensor) -> Tensor:
            return -output

    with pytest.raises(ValueError, match="damping must be a number of at least 0, got 'auto'"):
        ekfac(make_model(), damping="auto")
    with pytest.raises(ValueError, match="curvature must be one of 'gauss_newton', 'empirical'"):
        ekfac(make_model(), curvature="true")
    model, data = Net(nn.Linear(6, 1), output=Plain()), TensorDataset(TRAIN.tensors[0], TRAIN.tensors[1].float())
    with pytest.raises(ValueError, match=r"no curvature in net.0 at checkpoint 0"):
        EKFACInfluence(model, [model.state_dict()]).attribute(make_trainer(), data, data)
