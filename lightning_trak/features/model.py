"""The copy of the user's module. It is differentiated at one checkpoint after another."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.backends import cudnn
from typing_extensions import Self

from lightning_trak.checkpoints.base import Checkpoint
from lightning_trak.checkpoints.copies import Original, copy_module, enter_eval
from lightning_trak.checkpoints.digests import weights_digest
from lightning_trak.gradients import ParameterSelection, select_parameters
from lightning_trak.gradients.base import real_shape
from lightning_trak.gradients.batch import ExampleBatch, Layout, infer_batch_size
from lightning_trak.outputs import ModelOutput
from lightning_trak.outputs.evaluating import exact_attention, modules_in_eval
from lightning_trak.projections.base import BoundProjection, Projection
from lightning_trak.projections.preconditioned import PreconditionedProjection
from lightning_trak.texts.messages import listed


class ModelCopy:
    """A copy of the user's module. It has the weights of one checkpoint at a time.

    The user's module itself is never changed.

    Args:
        module: the trained model.
        output: the scalar output to differentiate.
        checkpoints: the weights, one set per checkpoint.
        digests: the digests of their weights, :func:`~lightning_trak.checkpoints.digests.weights_digest`.
        parameters: which parameters to differentiate, see :func:`~lightning_trak.gradients.select_parameters`.
        keep: whether to keep the weights of all checkpoints in memory, for repeated use.

    Attributes:
        original: the user's module.
        module: the copy.
        output: a copy of the output.
        places: for messages, the words that name each checkpoint.
        streams: for each checkpoint, a number for its random draws that depends on its weights alone.
        names: canonical name -> name in ``module``, for each selected parameter.
        shapes: shapes of the gradients of selected parameters, by canonical name.
        sizes: numbers of elements of these gradients, by canonical name.
        checkpoint: the number of the checkpoint whose weights the copy has; None at first.
        device: the device of the copy.
        keeps: whether the weights of all checkpoints are kept in memory.
        sharded: whether the model is sharded, so that all ranks compute each batch together.
    """

    sharded: ClassVar[bool] = False

    def __init__(
        self,
        module: nn.Module,
        output: ModelOutput,
        checkpoints: Sequence[Checkpoint],
        digests: Sequence[str],
        parameters: ParameterSelection = None,
        keep: bool = False,
    ) -> None:
        self.original = module
        self.module = copy_module(module, configure=not self.sharded)  # a sharded one is configured once processes run
        self._loading = Original(self.module, partial=any(item.partial for item in checkpoints))
        self.output = copy.deepcopy(output)
        self.checkpoints = checkpoints
        self._digests = digests
        self.places = [f"at checkpoint {number} ({item.name})" for number, item in enumerate(checkpoints)]
        self.streams = [stream_of(digest) for digest in digests]
        self.names = select_parameters(self.module, parameters)
        shapes = {name: real_shape(parameter) for name, parameter in self.module.named_parameters()}
        self.shapes = {name: shapes[raw] for name, raw in self.names.items()}
        self.sizes = {name: shape.numel() for name, shape in self.shapes.items()}
        self.keeps = keep
        self._weights: dict[int, dict[str, Tensor]] = {}
        # cuDNN cannot differentiate recurrent layers in eval mode.
        self._recurrent = any(isinstance(part, nn.RNNBase) for part in self.module.modules())
        self.checkpoint: int | None = None
        self.device = torch.device("cpu")

    def with_output(self, output: ModelOutput) -> Self:
        """The same copy of the module, at its current checkpoint, with a copy of another output."""
        other = copy.copy(self)
        with torch.inference_mode(False):  # autograd saves the tensors of the output
            other.output = copy.deepcopy(output)
        modules_in_eval(other.output, self.device)
        return other

    @property
    def place(self) -> str:
        """For messages, the words that name the current checkpoint."""
        return self.places[self.checkpoint or 0]

    @property
    def size(self) -> int:
        """The number of elements of one gradient."""
        return sum(self.sizes.values())

    def load(self, number: int, device: torch.device) -> None:
        """Load the weights of a checkpoint into the copy, and set it to eval mode.

        Raises:
            ValueError: if the weights do not fit the module, or have changed since this object was made.
        """
        checkpoint = self.checkpoints[number]
        with torch.inference_mode(False), torch.no_grad():
            if number not in self._weights:
                if not self.keeps:
                    self._weights.clear()
                weights = checkpoint.load()
                if weights_digest(weights) != self._digests[number]:
                    raise ValueError(
                        f"the weights {self.places[number]} have changed since this TRAK was made; make a new one"
                    )
                self._weights[number] = weights
            self._loading.load(self._weights[number], checkpoint.name, checkpoint.frozen, checkpoint.partial)
            enter_eval(self.module)
            modules_in_eval(self.output, device)
        self.checkpoint, self.device = number, device

    @contextmanager
    def differentiable(self) -> Iterator[None]:
        """Leave the inference mode and the autocast in which Lightning predicts.

        Nothing can be differentiated in inference mode. Vmap does not always work with autocast. Hooks do, and enter
        it themselves for their forward passes.
        """
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(self.device.type, enabled=False),
            cudnn.flags(enabled=False) if self._recurrent else nullcontext(),
        ):
            yield

    def bind(self, projection: Projection, seed: int, number: int, preconditioned: bool) -> BoundProjection:
        """Fix a projection for a checkpoint, on the copy's device.

        Args:
            projection: the projection.
            seed: its seed.
            number: the number of the checkpoint.
            preconditioned: whether gradients are first multiplied by what the optimizer multiplied them by.

        Raises:
            ValueError: if the optimizer's preconditioner was not kept, or lacks a selected parameter.
        """
        bound = projection.bind(self.shapes, seed=seed, checkpoint=self.streams[number], device=self.device)
        if not preconditioned:
            return bound
        return PreconditionedProjection(bound, self.shapes, self._preconditioner(number), self.places[number])

    def _preconditioner(self, number: int) -> dict[str, Tensor]:
        kept, name = self.checkpoints[number].load_preconditioner(), self.checkpoints[number].name
        lacking = [key for key, shape in self.shapes.items() if key not in kept or kept[key].shape != shape]
        if lacking:
            raise ValueError(
                f"the preconditioner of {name} does not hold {len(lacking)} of {len(self.shapes)} selected parameters,"
                f" which the optimizer did not train before: {listed(lacking)};"
                " select those that it trained with parameters="
            )
        return {key: kept[key].to(self.device) for key in self.shapes}

    def make_context(self, batches: Iterable[Any], layout: Layout | None) -> dict[str, Tensor]:
        """Compute the output's context: what it needs from the training data at this checkpoint.

        Args:
            batches: training examples on the copy's device.
            layout: which parts of a batch belong to single examples.
        """
        with self.differentiable(), exact_attention():
            fresh = (ExampleBatch(batch, infer_batch_size(batch), layout).fresh() for batch in batches)
            return {name: tensor.clone() for name, tensor in self.output.make_context(self.module, fresh).items()}


def stream_of(digest: str) -> int:
    """The number of a checkpoint for random draws.

    Args:
        digest: of its weights, :func:`~lightning_trak.checkpoints.digests.weights_digest`.
    """
    return int(digest[:15], 16)
