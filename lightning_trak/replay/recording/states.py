"""The state of training between two steps: parameters, buffers and what the optimizer keeps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_trak.checkpoints.names import canonical_name


def named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by canonical name. A tied one has its first name only."""
    return {canonical_name(name): parameter for name, parameter in module.named_parameters()}


def named_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers by canonical name, those that are not persistent included. A shared one has its first name only."""
    return {canonical_name(name): buffer for name, buffer in module.named_buffers()}


@dataclass
class TrainingState:
    """All tensors that a step of training changes.

    Attributes:
        parameters: by canonical name.
        buffers: by canonical name.
        moments: what the optimizer keeps for each parameter, by the parameter's name and the optimizer's own name.
    """

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module, optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> TrainingState:
        """The state of a module and its optimizer, which changes with their next step.

        Args:
            module: the module.
            optimizer: its optimizer.
            parameters: the module's :func:`named_parameters`.
        """
        moments = {
            name: {key: value.detach() for key, value in state.items() if isinstance(value, Tensor)}
            for name, parameter in parameters.items()
            if (state := optimizer.state.get(parameter))
        }
        return cls(_detached(parameters), _detached(named_buffers(module)), moments)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> TrainingState:
        """The state of :meth:`tensors`."""
        state = cls({}, {})
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            if kind == "moment":
                parameter, _, own = name.rpartition("/")
                state.moments.setdefault(parameter, {})[own] = tensor
            else:
                (state.parameters if kind == "parameter" else state.buffers)[name] = tensor
        return state

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors, each with a name that tells its kind."""
        yield from ((f"parameter/{name}", tensor) for name, tensor in self.parameters.items())
        yield from ((f"buffer/{name}", tensor) for name, tensor in self.buffers.items())
        for name, kept in self.moments.items():
            yield from ((f"moment/{name}/{key}", tensor) for key, tensor in kept.items())

    @property
    def nbytes(self) -> int:
        """The number of bytes of all tensors."""
        return sum(tensor.nbytes for _, tensor in self.tensors())

    def copy(self) -> TrainingState:
        """Copies of the tensors, on their devices."""
        return TrainingState.from_tensors({name: tensor.clone() for name, tensor in self.tensors()})

    @torch.no_grad()
    def load(
        self, module: nn.Module, optimizer: Optimizer | None = None, parameters: Mapping[str, Tensor] | None = None
    ) -> None:
        """Copy the state into a module and its optimizer.

        Args:
            module: a module with parameters and buffers of the same names and shapes.
            optimizer: gets copies of the moments; None: only the module is loaded.
            parameters: as in :meth:`of`.

        Raises:
            ValueError: if the module lacks a tensor.
        """
        parameters = named_parameters(module) if parameters is None else parameters
        for own, kept in ((parameters, self.parameters), (named_buffers(module), self.buffers)):
            for name, tensor in kept.items():
                if name not in own:
                    raise ValueError(
                        f'{type(module).__name__} lacks the tensor "{name}" of the recorded state; if a forward pass'
                        " makes it, call the module with a batch first; if training made it, as pruning does, train"
                        " without"
                    )
                if own[name].shape != tensor.shape:  # a buffer that grows
                    own[name].data = tensor.to(own[name].device)
                own[name].copy_(tensor)
        if optimizer is not None:
            optimizer.state.clear()
            fused = {
                parameter: bool(group.get("fused") or group.get("capturable"))
                for group in optimizer.param_groups
                for parameter in group["params"]
            }
            for name, moments in self.moments.items():
                parameter = parameters[name]
                # torch keeps the count of steps on the CPU, unless a fused kernel reads it
                counts = parameter.device if fused.get(parameter) else torch.device("cpu")
                optimizer.state[parameter] = {
                    key: value.to(counts if key == "step" else parameter.device, copy=True)
                    for key, value in moments.items()
                }


def _detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Difference:
    """How far a state is from the recorded one.

    Attributes:
        identical: whether all tensors have the same bits.
        largest: the largest norm of the difference of a floating-point tensor, relative to the recorded one's.
        name: the tensor with the largest difference.
    """

    identical: bool
    largest: float
    name: str


def difference(state: TrainingState, recorded: TrainingState) -> Difference:
    """Compare a state with the recorded one."""
    found, expected = dict(state.tensors()), dict(recorded.tensors())
    if found.keys() != expected.keys():
        return Difference(False, float("inf"), min(found.keys() ^ expected.keys()))
    identical, largest, worst = True, 0.0, next(iter(expected), "")
    for name, tensor in expected.items():
        own = found[name].to(tensor.device)
        if torch.equal(own, tensor):
            continue
        identical = False
        scale = float(tensor.double().norm())
        apart = float((own.double() - tensor.double()).norm())
        relative = apart / scale if scale and math.isfinite(apart) else float("inf")
        if relative > largest:
            largest, worst = relative, name
    return Difference(identical, largest, worst)
