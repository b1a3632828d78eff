"""What every gradient engine does: gradients of the declared output, one row per example."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from lightning_trak.outputs import ModelOutput


class GradientEngine(ABC):
    """Per-example gradients of a model output.

    Call it outside inference mode, on a module in eval mode. The module's parameters, ``.grad`` and buffers are left
    alone.

    Args:
        module: the model.
        output: the scalar output that is differentiated.
        names: canonical parameter name -> name in ``module``; only these are differentiated.
    """

    def __init__(self, module: nn.Module, output: ModelOutput, names: dict[str, str]) -> None:
        self.module = module
        self.output = output
        parameters = dict(module.named_parameters())
        self.parameters = {name: parameters[raw] for name, raw in names.items()}
        self.names = names

    @abstractmethod
    def __call__(self, batch: Any, size: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Differentiate each example's output.

        Args:
            batch: a batch without inference tensors.
            size: its number of examples.

        Returns:
            The outputs, shape ``(size,)``, and by canonical name the gradients, shape ``(size, numel)``.
        """

    def _one(self, value: Tensor) -> Tensor:
        """The scalar of a batch of one, checked."""
        if value.shape != (1,):
            raise ValueError(
                f"{type(self.output).__name__}.output returned shape {tuple(value.shape)} for a batch of one example;"
                " expected (1,): one scalar per example"
            )
        return value.squeeze(0)
