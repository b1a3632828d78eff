"""Fully connected layers."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_trak.gradients.hooks.layers.base import Layer, LayerCall


class LinearLayer(Layer, covers=[nn.Linear, "transformers.models.falcon.modeling_falcon.FalconLinear"]):
    """``nn.Linear`` on inputs of any rank. The weight's gradient is a sum of outer products over positions."""

    def gradient(self, parameter: str, call: LayerCall) -> Tensor:
        """Shape ``(size, rows, columns)`` for the weight; for the bias, a sum over positions."""
        if parameter == "bias":
            return _positions(call.output_gradient, call.size).sum(1)
        return _summed_products(*self.matrix_factors(call))

    def has_rows(self, parameter: str) -> bool:
        """True for the weight."""
        return parameter == "weight"

    def gradient_rows(self, parameter: str, call: LayerCall, rows: range) -> Tensor:
        """Shape ``(size, len(rows), columns)``."""
        all_rows, columns = self.matrix_factors(call)
        return _summed_products(all_rows[:, :, rows.start : rows.stop], columns)

    def projected_gradient(self, parameter: str, call: LayerCall, left: Tensor, right: Tensor) -> Tensor | None:
        """Shape ``(size, l, r)``. Both factors of the weight's gradient are projected, and then multiplied."""
        if parameter != "weight":
            return None
        rows, columns = self.matrix_factors(call)
        return (rows @ left).transpose(1, 2) @ (columns @ right)

    def has_factors(self) -> bool:
        """Always true."""
        return True

    def factors(self, call: LayerCall) -> tuple[Tensor, Tensor]:
        """The output's gradients and the inputs, by position."""
        return _positions(call.output_gradient, call.size), _positions(call.inputs, call.size)


class TransposedLinearLayer(LinearLayer, covers=["transformers.pytorch_utils.Conv1D"]):
    """GPT-2's linear layer in Hugging Face Transformers. Its weight is the transpose of ``nn.Linear``'s."""

    rows_are_inputs = True


def _positions(tensor: Tensor, size: int) -> Tensor:
    """Shape ``(size, positions, width)``."""
    return tensor.reshape(size, -1, tensor.shape[-1])


def _summed_products(rows: Tensor, columns: Tensor) -> Tensor:
    """The sum of outer products over positions, shape ``(size, rows, columns)``."""
    # For one position there is no sum. Many small matrix products would take several times as long, for the same bits.
    return rows.mT * columns if rows.shape[1] == 1 else rows.mT @ columns
