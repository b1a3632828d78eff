"""How a LightningModule declares the output that is attributed."""

from __future__ import annotations

from torch import nn

from lightning_trak.outputs.base import ModelOutput


class AttributionMixin:
    """Lets a LightningModule declare its attributed output, as ``configure_optimizers`` declares its optimizers.

    Example:
        >>> import lightning as L
        >>> from lightning_trak.outputs import ClassificationMargin
        >>> class LitNet(AttributionMixin, L.LightningModule):
        ...     def configure_model_output(self):
        ...         return ClassificationMargin()
    """

    def configure_model_output(self) -> ModelOutput:
        """The output whose gradients are attributed; override it.

        Raises:
            RuntimeError: if it is not overridden.
        """
        name = type(self).__name__
        raise RuntimeError(
            f"{name} does not say which output to attribute: override {name}.configure_model_output(self) to return a"
            " lightning_trak.outputs.ModelOutput, e.g. ClassificationMargin() for batches (inputs, labels) with"
            " logits = self(inputs)"
        )


def declared_output(
    module: nn.Module, output: ModelOutput | None = None, otherwise: str = "pass output="
) -> ModelOutput:
    """The output to attribute: the one given, or else the one that the module declares.

    Args:
        module: a module with :class:`AttributionMixin`, if no output is given.
        output: takes the place of the module's own.
        otherwise: what the user can do instead, for the error.

    Raises:
        TypeError: if there is none, or it is not a ModelOutput.
    """
    if output is None:
        if not isinstance(module, AttributionMixin):
            raise TypeError(
                f"{type(module).__name__} declares no model output: derive it from AttributionMixin and define"
                f" configure_model_output(), or {otherwise}"
            )
        output = module.configure_model_output()
    if not isinstance(output, ModelOutput):
        raise TypeError(f"the model output must be a ModelOutput, got {type(output).__name__}")
    return output
