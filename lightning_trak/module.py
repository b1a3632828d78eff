"""How a LightningModule declares the output that is attributed."""

from __future__ import annotations

from typing import cast

from torch import nn

from lightning_trak.outputs import ModelOutput


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


def declared_output(model: nn.Module, output: ModelOutput | None) -> ModelOutput:
    """The output to attribute: the one that is given, or else what the model declares.

    Raises:
        TypeError: if there is neither, or it is no ModelOutput.
    """
    if output is None:
        if not isinstance(model, AttributionMixin):
            raise TypeError(
                f"{type(model).__name__} declares no model output: derive it from AttributionMixin and define"
                " configure_model_output(), or pass output="
            )
        output = model.configure_model_output()
    if not isinstance(output, ModelOutput):
        raise TypeError(f"the model output must be a ModelOutput, got {type(output).__name__}")
    return output


def uncompiled(model: nn.Module) -> nn.Module:
    """What torch.compile was given, since copies cannot share its code; any other module as it is."""
    return cast(nn.Module, model._orig_mod) if isinstance(getattr(model, "_orig_mod", None), nn.Module) else model
