"""How a LightningModule declares the output that is attributed."""

from __future__ import annotations

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
