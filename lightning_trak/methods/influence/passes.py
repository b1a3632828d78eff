"""Passes over data with the model at one checkpoint."""

import copy
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from typing_extensions import Self

from lightning_trak.features.checks.loss_comparison import warn_of_other_loss
from lightning_trak.features.checks.untrained import warn_of_untrained
from lightning_trak.features.dtypes import feature_dtype
from lightning_trak.features.engines import EngineName, choose_engine, make_engine
from lightning_trak.features.extractor import GRADIENT_BYTES, FeatureExtractor
from lightning_trak.features.finiteness import require_finite
from lightning_trak.features.model import ModelCopy
from lightning_trak.features.rows import Features
from lightning_trak.fingerprints.digests import content_digest
from lightning_trak.gradients.base import differentiating
from lightning_trak.gradients.batch import ExampleBatch, Layout, find_layout
from lightning_trak.gradients.precision import WorkingPrecision
from lightning_trak.gradients.separable import separable
from lightning_trak.methods.examples import Examples
from lightning_trak.outputs import ModelOutput
from lightning_trak.outputs.evaluating import exact_attention
from lightning_trak.packages import both, is_a
from lightning_trak.projections import IdentityProjection
from lightning_trak.running.batches import TransferHooks, on_device
from lightning_trak.running.chunks import chunked
from lightning_trak.running.data.content import FEW, spread
from lightning_trak.running.data.loading import batch_size_of, load, sample_batches
from lightning_trak.running.data.singles import is_one_by_one
from lightning_trak.running.random_states import isolated_random_states


class Passes:
    """Passes over data with a copy of the model, on the Trainer's device and in float32 or float64.

    Args:
        model: the copy.
        seed: seed of all random draws.
        trainer: the Trainer whose device is used. Its precision is used if it is ``"64-true"``.
        train: the training examples.
        engine: the engine that differentiates; ``"auto"`` chooses one at the first checkpoint.

    Attributes:
        noise_level: what the automatic damping is multiplied by, beside the dispersion of the loss, see
            :class:`~lightning_trak.scoring.newton.noise.Noise`; 1 until it is known.
        begun_with: how many of the first training examples the output's context comes from; None: all.

    Raises:
        ValueError: if the Trainer's precision changes layers, or a selected parameter is not of real numbers.
    """

    def __init__(
        self, model: ModelCopy, seed: int, trainer: L.Trainer, train: Examples, engine: EngineName = "auto"
    ) -> None:
        self.model = model
        self._seed = seed
        self.train = train
        self.noise_level = 1.0
        self.begun_with: int | None = None
        self.layout: Layout | None = None
        self.engine_name: EngineName | None = None  # "auto" is chosen at the first checkpoint
        self._layouts: dict[Examples, tuple[DataLoader[Any], Layout]] = {}
        self.device = trainer.strategy.root_device
        plugin = trainer.precision_plugin
        if type(plugin) not in both(Precision) and not is_a(plugin, DoublePrecision, HalfPrecision, MixedPrecision):
            raise ValueError(
                f"{type(plugin).__name__} changes layers, but influence functions need the model's own layers in"
                ' float32 or float64: use a Trainer with precision="32-true" or "64-true"'
            )
        half = is_a(plugin, HalfPrecision)
        (model.module if half else plugin.convert_module(model.module)).to(self.device)
        for part in model.module.modules():
            if isinstance(part, (nn.Embedding, nn.EmbeddingBag)):
                part.sparse = False  # the same gradient in dense form, which all operations accept
        self._precision = WorkingPrecision(model.module, convert=half)
        parameters = dict(model.module.named_parameters())
        self.parameters = {name: parameters[raw] for name, raw in model.names.items()}
        for name, parameter in self.parameters.items():
            if not parameter.is_floating_point():
                raise ValueError(
                    f"{name} is of {parameter.dtype}, but influence functions only differentiate real numbers: leave it"
                    " out with parameters="
                )
        self.size = model.size
        self.dtype = torch.promote_types(next(iter(self.parameters.values())).dtype, torch.float32)
        identity = IdentityProjection()
        self._identity = identity.bind(model.shapes, seed=seed, checkpoint=0, device=self.device)
        if engine != "auto":
            self.use_engine(engine)

    @property
    def where(self) -> str:
        """The checkpoint's number and name, for errors."""
        number = cast(int, self.model.checkpoint)
        return f"checkpoint {number} ({self.model.checkpoints[number].name})"

    def key(self, purpose: str) -> str:
        """The key of random draws for a purpose at this checkpoint."""
        return f"{self._seed}/{self.model.checkpoint}/{purpose}"

    def random_vector(self, purpose: str) -> Tensor:
        """A normal vector over all parameters, ``(p,)``, drawn for a purpose at this checkpoint."""
        generator = torch.Generator().manual_seed(random.Random(self.key(purpose)).getrandbits(63))
        return torch.randn(self.size, generator=generator, dtype=self.dtype).to(self.device)

    def enter(self, checkpoint: int) -> None:
        """Load the weights of a checkpoint, and compute the output's context from the training data there."""
        model = self.model
        model.load(checkpoint, self.device)
        with self.computing():
            if model.output.context_size:
                key = f"{self._seed}/{model.streams[checkpoint]}/context"  # as that of a store
                sample = sample_batches(self.train.loader, model.output.context_size, key, self.begun_with)
                batches = self.batches(self.train, sample)
                model.output.set_context(model.make_context((batch for batch, _ in batches), self.layout))
            if self.engine_name is None:
                ((batch, size),) = self.batches(self.train, [range(min(2, len(self.train)))])
                self.use_engine(choose_engine(model, ExampleBatch(batch, size, self.layout)).name)
                ((batch, size),) = self.batches(self.train, [spread(len(self.train), FEW)])
                few = ExampleBatch(batch, size, self.layout)
                warn_of_other_loss(model, few, batch_size_of(self.train.loader))
                warn_of_untrained(model)

    def use_engine(self, name: EngineName) -> None:
        """Use this engine to differentiate from now on."""
        self.engine_name = name
        self._engine = make_engine(name, self.model)

    @contextmanager
    def asking(self, output: ModelOutput | None) -> Iterator[None]:
        """Differentiate another output, at the present checkpoint; None: no other one.

        An engine that is found wrong meanwhile is not used again.
        """
        if output is None:
            yield
            return
        model = self.model
        self.model = model.with_output(output)
        try:
            self.use_engine(cast(EngineName, self.engine_name))
            yield
        finally:
            self.model = model
            self.use_engine(cast(EngineName, self.engine_name))

    def over(self, train: Examples, output: ModelOutput) -> Self:
        """Passes over other training examples, of another output, at the present checkpoint. They share the model."""
        other = copy.copy(self)
        other.train, other.model, other._layouts = train, self.model.with_output(output), {}
        other.use_engine(cast(EngineName, self.engine_name))
        return other

    def extractor(self) -> FeatureExtractor:
        """An extractor of gradients without projection, for the batches from :meth:`batches`."""
        dtype = feature_dtype(self.dtype)
        return FeatureExtractor(self.model, self._engine, self._identity, dtype, self.layout, falls_back=True)

    def batches(
        self, examples: Examples, positions: Iterable[Sequence[int]] | None = None
    ) -> Iterator[tuple[Any, int]]:
        """Yield batches on the device, with their sizes.

        Args:
            examples: the dataset.
            positions: the positions of the examples of each batch; default: all examples once, in batches of the
                loader's size, or one by one if batches cannot be taken apart.

        Raises:
            ValueError: if examples are not the same each time that they are loaded.
        """
        if examples not in self._layouts:
            self._layouts[examples] = self._learn(examples)
        loader, self.layout = self._layouts[examples]
        if positions is None:
            together = 1 if is_one_by_one(loader) else batch_size_of(loader)
            positions = chunked(range(len(examples)), together)
        asked, loaded = itertools.tee(positions)  # workers draw positions ahead of time
        for batch, part in zip(self._on_device(load(loader, loaded), examples), asked, strict=True):
            yield batch, len(part)

    def _learn(self, examples: Examples) -> tuple[DataLoader[Any], Layout]:
        """Find a loader whose batches can be taken apart, and how it collates examples, which must stay the same.

        Raises:
            ValueError: if they do not: passes over other data each time would be of no one function.
        """
        some, loader = spread(len(examples), FEW), separable(examples.loader)
        twice, thrice, first, again = self._on_device(load(loader, [[0, 0], [0, 0, 0], some, some]), examples)
        layout = find_layout(twice, thrice)
        if content_digest(first) != content_digest(again):
            raise ValueError(
                "examples are not the same twice, perhaps because of random augmentation in the dataset, the collate"
                " function or a batch transfer hook; they are loaded several times: give data without random"
                " augmentation"
            )
        return loader, layout

    def parts(
        self, examples: Examples, positions: Sequence[int] | None = None, fitting: int | None = None
    ) -> Iterator[tuple[Sequence[int], tuple[Any, int]]]:
        """Yield batches on the device, with their sizes, in order, and the positions of their examples.

        Args:
            examples: the dataset.
            positions: positions of the examples; default: all.
            fitting: the number of examples in a batch, at most; default: the loader's.
        """
        chosen = range(len(examples)) if positions is None else positions
        size = batch_size_of(examples.loader)
        parts = chunked(chosen, size if fitting is None else min(size, fitting))
        yield from zip(parts, self.batches(examples, parts), strict=True)

    def cut(self, examples: Examples) -> list[Sequence[int]]:
        """The positions of all examples, in the batches of :meth:`rows`."""
        return chunked(range(len(examples)), min(batch_size_of(examples.loader), self._fitting))

    @property
    def _fitting(self) -> int:
        """How many gradients fit in memory."""
        return max(1, GRADIENT_BYTES // (self.size * self.dtype.itemsize))

    def rows(
        self, examples: Examples, positions: Sequence[int] | None = None
    ) -> Iterator[tuple[Sequence[int], Features]]:
        """Yield gradients, Q and R of examples in order, in batches that fit in memory, with their positions.

        Args:
            examples: the dataset.
            positions: positions of the examples; default: all.
        """
        for part, (batch, _) in self.parts(examples, positions, self._fitting):
            numbers = torch.tensor(part)
            with self.computing():
                features = self.extractor()(batch, numbers)
            require_finite(features, numbers, f"at {self.where}")
            yield part, features

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """Split rows ``(n, p)`` over all parameters into one view of shape ``(n, *shape)`` per parameter."""
        parts = torch.split(rows, list(self.model.sizes.values()), dim=1)
        shapes = self.model.shapes
        return {name: part.view(len(rows), *shapes[name]) for name, part in zip(shapes, parts, strict=True)}

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Compute in the precision of the weights. All methods use this, so they compute in the same way."""
        with self.model.differentiable(), self._precision.active(), exact_attention():
            yield

    @contextmanager
    def differentiable(self) -> Iterator[None]:
        """Differentiate with respect to the selected parameters, once or several times."""
        with (
            self.computing(),
            differentiating(self.model.module, self.parameters.values()),
            sdpa_kernel(SDPBackend.MATH),  # the fused kernels of attention cannot be differentiated twice
            torch.enable_grad(),
        ):
            yield

    def _on_device(self, batches: Iterable[Any], examples: Examples) -> Iterator[Any]:
        hooks = TransferHooks(self.model.module, examples.datamodule)
        return on_device(batches, self.device, self._precision.convert_input, hooks)


@contextmanager
def without_gradients() -> Iterator[None]:
    """For everything that is done with passes: the user's random states, modes and autograd are left alone."""
    with isolated_random_states(), torch.inference_mode(False), torch.no_grad():
        yield
