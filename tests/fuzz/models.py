"""From a specification to a model, its output and the weights of its checkpoints."""

from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lightning_trak import AttributionMixin
from lightning_trak.outputs import ClassificationMargin, ModelOutput, NegativeLoss, RegressionOutput
from tests.fuzz.data import unpack
from tests.fuzz.parts import CLASSES, PARTS
from tests.fuzz.specs import Spec

HOLDERS = (
    "InAList",
    "InADict",
    "Partial",
    "NestedClosure",
)  # would go on with a weight that is not the layer's any more


class Net(nn.Module):
    """Stem, body and head, with the specification's habits."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.habits, self.returns = spec.habits, spec.returns
        self.second = spec.form == "examples_second"
        self.stem = PARTS[spec.stem]()
        self.body = nn.ModuleList(PARTS[name]() for name in spec.body)
        if "part_repeated" in spec.habits and spec.vector:
            self.body.append(self.body[len(spec.body) - len(spec.vector)])
        if "aliased" in spec.habits and len(self.body):
            self.encoder = self.body[0]
        if "weights_tied" in spec.habits:
            free = [part for part in self.body if type(part).__name__ not in HOLDERS]
            layers = [part.layer for part in free if type(getattr(part, "layer", None)) is nn.Linear]
            for layer in layers[1:]:
                if layer.weight.shape == layers[0].weight.shape:
                    layer.weight = layers[0].weight
        self.head = PARTS[spec.head](1 if spec.output in ("regression", "binary") else CLASSES)

    def forward(self, x: Any, mask: Tensor | None = None) -> Any:
        if isinstance(x, list):
            x = torch.stack(x) if mask is None else pad_sequence(x, batch_first=True)
        elif self.second and x.ndim > 2:
            x = x.transpose(0, 1)
        if "in_place_input" in self.habits:
            if x.is_floating_point():
                x.sub_(0.3).div_(1.5)
            else:
                x.mul_(3).remainder_(7)  # padding stays 0
        if "in_place_mask" in self.habits and mask is not None:
            mask.logical_not_()
            mask = ~mask
        for part in (self.stem, *self.body):
            x = part(x, mask)
            if isinstance(x, tuple):
                x, mask = x
        logits = self.head(x, self)
        if self.returns == "dict":
            return {"logits": logits}
        if self.returns == "object":
            return SimpleNamespace(logits=logits)
        return (logits, x) if self.returns == "tuple" else logits


class LitNet(AttributionMixin, L.LightningModule):
    """The same, with everything that a LightningModule is."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.net, self.spec = Net(spec), spec

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.net(*args, **kwargs)

    def configure_model_output(self) -> ModelOutput:
        return make_output(self.spec)


def make_model(spec: Spec) -> nn.Module:
    """The same model each time; nothing of one is shared with another."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        model = (LitNet if "lightning" in spec.habits else Net)(spec).double()
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 2)
    parameters = list(model.parameters())
    for number in spec.frozen:
        if sum(parameter.requires_grad for parameter in parameters) > 1 and parameters:
            parameters[number % len(parameters)].requires_grad_(False)
    return model.eval()


def make_checkpoints(spec: Spec) -> list[dict[str, Tensor]]:
    """The weights of each checkpoint."""
    made = []
    for number, kind in enumerate(spec.checkpoints):
        model = make_model(spec)
        generator = torch.Generator().manual_seed(100 + number)
        for name, parameter in model.named_parameters():
            last = "head.out" in name
            if kind == "random":
                parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.7
            elif (kind == "zero_head" and last) or (
                kind == "zero_body" and ".body.0" in f".{name}" and "parametrizations" not in name
            ):
                parameter.data = torch.zeros_like(parameter)
        made.append({name: value.clone() for name, value in model.state_dict().items()})
    return made


def selected(spec: Spec, model: nn.Module) -> list[str]:
    """Names of the parameters that the specification asks for; all that require gradients, if none of them fits."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    chosen = {
        "all": [],
        "head": [name for name in names if "head." in name],
        "body": [name for name in names if "head." not in name],
        "biases": [name for name in names if "bias" in name],
    }[spec.selection]
    return chosen or names


def _logits(result: Any) -> Tensor:
    if isinstance(result, dict):
        return result["logits"]
    if isinstance(result, tuple):
        return result[0]
    return getattr(result, "logits", result)


def _call(module: nn.Module, batch: Any, pop: bool) -> tuple[Tensor, Tensor]:
    """Logits, changed by the extras, and labels."""
    x, mask, labels, extras = unpack(batch, pop)
    logits = _logits(module(x) if mask is None else module(x, mask))
    classes = logits.shape[-1]
    for name in sorted(extras):
        value = extras[name]
        if name == "weights":
            logits = logits * value.unsqueeze(-1)
        elif name == "scalar":
            logits = logits * value
        elif name == "numbers":
            logits = logits * torch.tensor(value, dtype=logits.dtype).unsqueeze(-1)
        elif name == "scales":
            logits = logits * sum(value)
        elif name == "class_weights":
            logits = logits * value[:classes]
        elif name == "table":
            logits = logits * value[:, :classes]
        elif name in ("count", "sum_of_weights"):
            logits = logits / value
    return logits, labels


def forward(module: nn.Module, batch: Any) -> Tensor:
    return _call(module, batch, pop=False)[0]


def losses(module: nn.Module, batch: Any) -> Tensor:
    logits, labels = _call(module, batch, pop=False)
    return F.cross_entropy(logits, labels, reduction="none")


def losses_popped(module: nn.Module, batch: Any) -> Tensor:
    logits, labels = _call(module, batch, pop=True)
    return F.cross_entropy(logits, labels, reduction="none")


def mean_loss(module: nn.Module, batch: Any) -> Tensor:
    return losses(module, batch).mean()


def mean_loss_popped(module: nn.Module, batch: Any) -> Tensor:
    return losses_popped(module, batch).mean()


class Gap(ModelOutput):
    """How far the label's logit is above the mean, or a prediction above its target, and some loss of that."""

    def __init__(self, pop: bool) -> None:
        self.pop = pop

    def output(self, module: nn.Module, batch: Any) -> Tensor:
        logits, labels = _call(module, batch, self.pop)
        if logits.shape[-1] == 1:
            return logits.squeeze(-1) - labels
        return logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) - logits.mean(-1)

    def loss(self, output: Tensor) -> Tensor:
        return (output - 2).square() + output.exp() / 9


def output_name(spec: Spec) -> str:
    """Which output is taken: of nested batches only one's own functions can find the labels."""
    return "own" if spec.form == "nested" and spec.output not in ("loss", "mean_loss") else spec.output


def make_output(spec: Spec) -> ModelOutput:
    """The specification's output, as the package has it."""
    pop, name = "pops_labels" in spec.habits, output_name(spec)
    if name == "own":
        return Gap(pop)
    if name == "loss":
        return NegativeLoss(losses_popped if pop else losses)
    if name == "mean_loss":
        return NegativeLoss(mean_loss_popped if pop else mean_loss)
    # Without forward= the package calls the module on what is beside the labels, which extras are not made for.
    simple = spec.form in ("tuple", "list", "dict", "ordered", "user_dict", "read_only") and not spec.extras
    kind = RegressionOutput if name == "regression" else ClassificationMargin
    return kind(forward=None if simple and "own_forward" not in spec.habits else forward)


def plain_output(spec: Spec, module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """The same without the package, for one example: its output f, and Q = -dl/df."""
    name = output_name(spec)
    if name == "own":
        gap = Gap(pop=False)
        value = gap.output(module, batch)
        variable = value.detach().requires_grad_()
        return value, -torch.autograd.grad(gap.loss(variable).sum(), variable)[0]
    if name in ("loss", "mean_loss"):
        value = -losses(module, batch)
        return value, torch.ones_like(value)
    logits, labels = _call(module, batch, pop=False)
    if name == "regression":
        value = logits.squeeze(-1) - labels
        return value, -value.detach()
    if name == "binary":
        value = logits.squeeze(-1) * (2 * labels - 1)
    else:
        chosen = F.one_hot(labels, CLASSES).bool()
        value = logits[chosen] - logits.masked_fill(chosen, -torch.inf).logsumexp(-1)
    return value, torch.sigmoid(-value.detach())
