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
    return _checked(output, "the model output")


def trained_output(module: nn.Module, output: ModelOutput | None) -> ModelOutput:
    """The output of training examples: :func:`declared_output`, which must be one that training acted on.

    Args:
        module: a module with :class:`AttributionMixin`, if no output is given.
        output: takes the place of the module's own.

    Raises:
        TypeError: if there is none, it is not a ModelOutput, or it is for targets alone.
    """
    output = declared_output(module, output)
    if output.for_targets:
        raise TypeError(
            f"this {type(output).__name__} is an output of targets alone: training examples need the output that"
            f" {type(module).__name__} was trained on. Give this one to score(..., output=) or attribute(...,"
            " output=); Metagradient also takes it with the training losses (losses=)"
        )
    return output


def require_alone(output: ModelOutput) -> None:
    """Check that the output of an example depends on no other training examples.

    Raises:
        TypeError: if it does, as that of :class:`~lightning_trak.outputs.ContrastiveMargin`.
    """
    if output.context_size:
        raise TypeError(
            f"{type(output).__name__} compares with training examples, which are not known here; pass another output by"
            " output="
        )


def fixed_output(module: nn.Module, output: ModelOutput | None) -> ModelOutput:
    """The output to compare between models: :func:`declared_output`, which must ask the same of all of them.

    Args:
        module: a module with :class:`AttributionMixin`, if no output is given.
        output: takes the place of the module's own.

    Raises:
        TypeError: if there is none, it is not a ModelOutput, or its labels are what each model predicts.
    """
    output = declared_output(module, output)
    if output.predicts_labels:
        raise TypeError(
            f'outputs of several models are compared here, and {type(output).__name__}(labels="predicted") may be about'
            " another class at each of them: name the class, as in labels=3, or give targets whose labels are the"
            " predictions that you ask about"
        )
    return output


def target_output(output: ModelOutput | None, trained: ModelOutput) -> ModelOutput | None:
    """The output of targets, if it is another one than that of the training examples; else None.

    Args:
        output: what the user gave for the targets.
        trained: the output of the training examples.

    Raises:
        TypeError: if it is not a ModelOutput.
        ValueError: if it needs a context of its own.
    """
    if output is None:
        return None
    if not _checked(output, "output").context_size:
        return output
    if output.fingerprint() == trained.fingerprint():
        return None
    raise ValueError(
        f"{type(output).__name__} compares with training examples, which are not known when targets are scored: make a"
        " store whose training examples have this output, and leave output= out there, or give an output without"
        " context_size"
    )


def _checked(output: ModelOutput, what: str) -> ModelOutput:
    """A user's output, which may be anything."""
    if isinstance(output, ModelOutput):
        return output
    if isinstance(output, type):
        name = output.__name__
        raise TypeError(f"{what} must be a ModelOutput, got the class {name}: make an object of it, {name}(...)")
    raise TypeError(f"{what} must be a ModelOutput, got {type(output).__name__}")
