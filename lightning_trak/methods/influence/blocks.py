"""The layers that a Kronecker factorisation covers, with weight and bias as one matrix."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_trak.gradients.hooks.layers import LayerCall, layer_of
from lightning_trak.gradients.hooks.tracked_module import TrackedModule, find_tracked_modules


@dataclass(frozen=True)
class Block:
    """One layer's parameters as a matrix ``(outputs, inputs)``; the bias is the weight of an input that is always 1.

    Attributes:
        tracked: the layer.
        weight: canonical name of the weight.
        bias: of the bias, if it is selected too.
    """

    tracked: TrackedModule
    weight: str
    bias: str | None

    @property
    def names(self) -> list[str]:
        """Canonical names of the block's parameters."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def gather(self, parts: dict[str, Tensor]) -> Tensor:
        """The block's matrices, ``(n, outputs, inputs)``, from rows by parameter, ``(n, *shape)`` each."""
        matrices = parts[self.weight].flatten(2)
        if self.tracked.layer.rows_are_inputs:
            matrices = matrices.transpose(1, 2)
        return matrices if self.bias is None else torch.cat([matrices, parts[self.bias].unsqueeze(2)], dim=2)

    def scatter(self, matrices: Tensor, parts: dict[str, Tensor]) -> None:
        """Write matrices to where :meth:`gather` takes them from."""
        if self.bias is not None:
            parts[self.bias].copy_(matrices[..., -1])
            matrices = matrices[..., :-1]
        if self.tracked.layer.rows_are_inputs:
            matrices = matrices.transpose(1, 2)
        parts[self.weight].copy_(matrices.reshape(parts[self.weight].shape))

    def factors(self, call: LayerCall) -> tuple[Tensor, Tensor]:
        """Output gradients ``(positions, outputs)`` and inputs ``(positions, inputs)`` of a batch."""
        outputs, inputs = (factor.flatten(0, 1) for factor in self.tracked.layer.factors(call))
        if self.bias is not None:
            inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)
        return outputs, inputs


def find_blocks(module: nn.Module, names: dict[str, str]) -> tuple[list[Block], dict[str, str]]:
    """The layers whose gradients are sums of outer products.

    Args:
        module: the model.
        names: canonical parameter name -> name in ``module``: the selected parameters.

    Returns:
        The blocks, and by canonical name the reason why each other parameter is left out.
    """
    parameters = dict(module.named_parameters())
    selected = {parameters[raw]: name for name, raw in names.items()}
    left_out = {
        selected[parameter]: f"{path} ({type(part).__name__}): its gradient is no sum of outer products"
        for path, part in module.named_modules()
        if (layer := layer_of(part)) is not None and not layer.has_factors()
        for parameter in part.parameters(recurse=False)
        if parameter in selected
    }
    remaining = {name: raw for name, raw in names.items() if name not in left_out}
    tracked_modules, uncovered = find_tracked_modules(module, remaining)
    left_out |= uncovered
    owners = [name for tracked in tracked_modules for name in tracked.parameters.values()]
    blocks = []
    for tracked in tracked_modules:
        own = tracked.parameters.values()
        weight, bias = tracked.parameters.get("weight"), tracked.parameters.get("bias")
        if weight is None:
            left_out |= dict.fromkeys(own, f"{tracked.description}: a bias without its weight")
        elif any(owners.count(name) > 1 for name in own):
            reason = "it is tied: its gradient is the sum of several layers' gradients"
            left_out |= dict.fromkeys(own, f"{tracked.description}: {reason}")
        else:
            blocks.append(Block(tracked, weight, bias))
    return blocks, left_out
