"""The base of the LightningModules that make features when ``trainer.predict`` runs them."""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, cast

import lightning as L
import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_trak.features.checks.loss_comparison import warn_of_other_loss
from lightning_trak.features.checks.same_function import (
    keep_examples,
    keeps_examples,
    require_as_before,
    require_same_outputs,
)
from lightning_trak.features.checks.soundness import require_sound
from lightning_trak.features.checks.untrained import warn_of_untrained
from lightning_trak.features.engines import EngineName, choose_engine, how, make_engine
from lightning_trak.features.extractor import FeatureExtractor
from lightning_trak.features.factors import FactorExtractor
from lightning_trak.features.model import ModelCopy
from lightning_trak.features.precision import autocast_of
from lightning_trak.features.rows import Features
from lightning_trak.features.settings import FeatureSettings
from lightning_trak.features.store import FeatureStore
from lightning_trak.fingerprints.digests import content_digest
from lightning_trak.gradients import GradientEngine
from lightning_trak.gradients.batch import ExampleBatch, Layout, find_layout
from lightning_trak.outputs import ModelOutput
from lightning_trak.projections.base import BoundProjection
from lightning_trak.projections.factors import BoundGradientFactors
from lightning_trak.running.data.content import FEW, spread, warn_of_random_items
from lightning_trak.running.data.loading import batch_size_of, load, num_examples, sample_batches
from lightning_trak.running.data.singles import Singles, is_one_by_one, joined
from lightning_trak.running.predict import PredictModule
from lightning_trak.running.ranks import Ranks
from lightning_trak.texts.printable import counted

AUDITED_TOGETHER = 1024  # targets are audited in groups of this size, as shards are


class ExtractorModule(PredictModule):
    """Makes features at one checkpoint after another.

    Args:
        model: a copy of the user's module.
        settings: how features are made.
        store: the store. It holds the model output's context and the fitted projection of each checkpoint.
        datamodule: the data module that gave the data, if there is one. It may have batch transfer hooks of its own.
        train_loader: the training data, from which contexts and projections are made that the store does not have;
            None when targets are scored.
        engine: the engine; None: that of the settings or of the store, or else the first examples decide.
        output: the output of the examples, if it is another one than that of the store.

    Attributes:
        engine_name: the name of the engine, once it is chosen.
        repeatable: whether the data are the same each time that they are loaded.
    """

    def __init__(
        self,
        model: ModelCopy,
        settings: FeatureSettings,
        store: FeatureStore,
        datamodule: L.LightningDataModule | None = None,
        train_loader: DataLoader[Any] | None = None,
        engine: EngineName | None = None,
        output: ModelOutput | None = None,
    ) -> None:
        super().__init__(model.module, datamodule)
        self.copied = model
        self._output = output
        self.settings = settings
        self.engine_name = engine if engine is not None or settings.engine == "auto" else settings.engine
        self.repeatable = True
        self._store = store
        self._train_loader = train_loader
        self._alone_and_together: tuple[Any, ...] | None = None
        self._few: ExampleBatch | None = None  # training examples whose loss is not yet compared with training_step's
        self._begun = {} if train_loader is None else store.begun()
        self._layout: Layout | None = None
        self._autocast: torch.dtype | None = None
        self._engine: GradientEngine | None = None
        self._extractor: FeatureExtractor | None = None
        self._bound: dict[int, BoundProjection] = {}
        self._entered: set[int] = set()  # checkpoints that were checked with batches of this layout
        self._made_features = False

    def setup(self, stage: str) -> None:
        """Compute in the Trainer's precision."""
        super().setup(stage)
        self._autocast = autocast_of(self.trainer, self.copied.output)

    def weights_digest(self) -> object:
        """Digests of the weights of all checkpoints."""
        return self.copied.streams

    def release(self) -> None:
        """Release the model, the engine and the projections."""
        super().release()
        del self.copied, self._store  # a Trainer that keeps this module must not keep others from the store
        self._engine = self._extractor = None
        self._bound.clear()

    def featurize(self, batch: Any, positions: Tensor, audited: Mapping[int, Any]) -> Features:
        """Features at the current checkpoint: see :class:`~lightning_trak.features.extractor.FeatureExtractor`."""
        assert self._extractor is not None
        rows = self._extractor(batch, positions, audited)
        if not self._made_features and not rows.features.any():
            output = type(self._output or self.copied.output).__name__
            warnings.warn(
                f"all features of examples {int(positions[0])} to {int(positions[-1])} {self.copied.place} are zero:"
                f" check that the output {output} depends on the selected parameters",
                stacklevel=2,
            )
        self._made_features = True
        return rows

    def enter(self, checkpoint: int) -> None:
        """Load a checkpoint, and make features at it from now on.

        Raises:
            ValueError: if the output of an example depends on the rest of its batch, or differs from that in the store.
        """
        model = self.copied
        if self._extractor is not None and model.checkpoint == checkpoint:
            return
        model.load(checkpoint, self.device)
        made: dict[str, dict[str, Tensor]] = {}
        if model.output.context_size:
            self._enter_context(checkpoint, made)
        asked = model if self._output is None else model.with_output(self._output)
        first = checkpoint not in self._entered
        self._entered.add(checkpoint)
        if first and self._alone_and_together is not None:
            require_sound(asked, self._layout, *self._alone_and_together)
        if self._few is not None and self._train_loader is not None:
            warn_of_other_loss(model, self._few, batch_size_of(self._train_loader))
            warn_of_untrained(model)
            self._few = None
        if self._engine is None:
            self._engine = self._settle_engine()
        extractor = self._extractor = self._new_extractor(model, self._engine, self._bind(checkpoint))
        if self.settings.projection.sample_size:
            self._enter_projection(checkpoint, made)
        if self._train_loader is not None:
            self._begin_shards(extractor, checkpoint, made)
            return
        if first:
            require_same_outputs(extractor, self._store, checkpoint)
        if asked is not model:
            engine = make_engine(cast(EngineName, self.engine_name), asked, self._autocast)
            self._extractor = self._new_extractor(asked, engine, extractor.projection)

    def _begin_shards(self, extractor: FeatureExtractor, checkpoint: int, made: dict[str, dict[str, Tensor]]) -> None:
        """Check the shards that the store has before others are added, and store what was made for the others.

        Args:
            extractor: the extractor at the checkpoint.
            checkpoint: the number of the checkpoint.
            made: extras that the store did not have, by name.
        """
        if checkpoint in self._begun and self._store.repeatable:
            shard = self._begun[checkpoint]
            require_as_before(extractor, self._store, (checkpoint, shard), *self._first_of(shard), made)
        self._settle(checkpoint, made)
        if not keeps_examples(self._store):
            batch, positions = self._first_of(0)
            keep_examples(extractor, self._store, batch, len(positions))

    def learn_batches(self, loader: DataLoader[Any]) -> None:
        """Find out from a few examples how a loader collates them.

        Args:
            loader: the loader of the batches to come.

        Raises:
            ValueError: if a batch does not hold the examples in the first dimension of its tensors, or hooks give other
                training batches each time.
        """
        last, some = num_examples(loader) - 1, spread(num_examples(loader), FEW)
        probes = [[0, 0], [0, 0, 0], [last, last], [0, last], some, some]
        twice, thrice, other, pair, first, again = self._batches(loader, probes)
        self.forget_batches()
        self._layout = find_layout(twice, thrice)
        self.repeatable = content_digest(first) == content_digest(again)
        if self._train_loader is None and not self.repeatable:
            warn_of_random_items("the data to score")
        if self._train_loader is not None and self._store.repeatable and not self.repeatable:
            raise ValueError(
                "batches differ each time although the items are the same: a batch transfer hook, such as"
                " on_after_batch_transfer, draws random numbers. Augment data only where self.trainer.training is true"
            )
        if self.copied.sharded and not self.repeatable:
            raise ValueError(
                "examples differ each time that they are loaded, so the ranks of a sharded model would see different"
                " data: give data without random augmentation"
            )
        if self._train_loader is not None and not self.copied.sharded:
            self._few = ExampleBatch(first, len(some), self._layout)
        if is_one_by_one(loader):
            if batch_size_of(loader) == 1:  # the user's model never gets a batch of several
                self._alone_and_together = (twice,)
                return
            pair = Singles(self._batches(joined(loader), [[0, last]]))
        sharded = self.copied.sharded  # all ranks take part in each of its forward passes
        self._alone_and_together = None if sharded else (twice, other, pair) if last and self.repeatable else (twice,)

    def forget_batches(self) -> None:
        """Forget how the loader collates examples."""
        self._layout = self._alone_and_together = self._extractor = None
        self._entered.clear()

    def _new_extractor(self, model: ModelCopy, engine: GradientEngine, projection: BoundProjection) -> FeatureExtractor:
        falls_back = self.settings.engine == "auto"
        kind = FactorExtractor if isinstance(projection, BoundGradientFactors) else FeatureExtractor
        return kind(model, engine, projection, self.settings.stored_dtype(projection.dim), self._layout, falls_back)

    def _bind(self, checkpoint: int) -> BoundProjection:
        """The projection of a checkpoint. It is kept as long as the checkpoint's weights."""
        if checkpoint not in self._bound:
            if not self.copied.keeps:
                self._bound.clear()
            settings, multiplied = self.settings, self.settings.preconditioned and self._train_loader is not None
            self._bound[checkpoint] = self.copied.bind(settings.projection, settings.seed, checkpoint, multiplied)
        return self._bound[checkpoint]

    def _enter_context(self, checkpoint: int, made: dict[str, dict[str, Tensor]]) -> None:
        output = self.copied.output
        with torch.inference_mode(False):  # autograd saves the context
            context = self._read_extra(checkpoint, "context")
            if context is None:
                batches = self._sample(checkpoint, "context", output.context_size)
                made["context"] = context = self.copied.make_context((batch for batch, _ in batches), self._layout)
            output.set_context({name: tensor.to(self.device) for name, tensor in context.items()})

    def _enter_projection(self, checkpoint: int, made: dict[str, dict[str, Tensor]]) -> None:
        extractor = cast(FeatureExtractor, self._extractor)
        fitted = self._read_extra(checkpoint, "projection")
        if fitted is None:
            projection = self.settings.projection
            name, count = type(projection).__name__, counted(projection.sample_size, "training example")
            rank_zero_info(f"{self._store.user}: fitting {name} to up to {count} {self.copied.place}")
            batches = self._sample(checkpoint, "projection", projection.sample_size)
            made["projection"] = fitted = extractor.fit_projection(batches)
        extractor.projection.set_fit(fitted)

    def _settle(self, checkpoint: int, made: dict[str, dict[str, Tensor]]) -> None:
        """Store extras that were made, and use what the store has: another process may have been faster."""
        for name, tensors in made.items():
            self._store.settle_extra(checkpoint, name, tensors, self._store.key)
        if "context" in made:
            self._enter_context(checkpoint, {})
        if "projection" in made:
            self._enter_projection(checkpoint, {})

    def _first_of(self, shard: int) -> tuple[Any, list[int]]:
        """The first two training examples of a shard, and their positions."""
        assert self._train_loader is not None
        positions = list(self._store.shard(shard))[:2]
        (batch,) = self._batches(self._train_loader, [positions])
        return batch, positions

    def _read_extra(self, checkpoint: int, name: str) -> dict[str, Tensor] | None:
        """Read an extra from the store; None if it has none. For a sharded model all ranks get it, or none does."""
        found = self._store.read_extra(checkpoint, name, self._store.key)
        if self.copied.sharded and not Ranks.of(self.trainer).all_true(found is not None):
            return None
        return found

    def _settle_engine(self) -> GradientEngine:
        """Choose an engine by the first two training examples, so that the choice is the same in every run.

        The store keeps the choice with its first shard. A run that writes no shard does not decide for later runs.
        """
        if self.engine_name is None:
            self.engine_name = cast("EngineName | None", self._store.settle_engine())
        if self.engine_name is None and self._train_loader is not None:
            choice = choose_engine(self.copied, self._first_two(self._train_loader), self._autocast)
            self.engine_name = choice.name
            rank_zero_info(
                f"{self._store.user}: gradients by {how(choice.name, self._autocast)}, chosen by engine='auto':"
                f" {choice.reason}"
            )
            return choice.engine
        self.engine_name = self.engine_name or "functional"
        return make_engine(self.engine_name, self.copied, self._autocast)

    def _sample(self, checkpoint: int, purpose: str, count: int) -> Iterator[tuple[Any, list[int]]]:
        """A uniform sample of the training data, without replacement: batches and the positions of their examples.

        Each checkpoint has its own. It is drawn from the examples that the store began with, so that it is the same one
        before and after data were appended.
        """
        if self._train_loader is None:
            raise RuntimeError(
                f'store "{self._store.directory}" has lost the {purpose} of checkpoint {checkpoint}, with which its'
                " features were made; call featurize again, which makes it again from the training data"
            )
        key = f"{self.settings.seed}/{self.copied.streams[checkpoint]}/{purpose}"
        positions = sample_batches(self._train_loader, count, key, self._store.begun_with)
        yield from zip(self._batches(self._train_loader, positions), positions, strict=True)

    def _first_two(self, loader: DataLoader[Any]) -> ExampleBatch:
        positions = list(range(min(2, num_examples(loader))))
        (batch,) = self._batches(loader, [positions])
        return ExampleBatch(batch, len(positions), self._layout)

    def _batches(self, loader: DataLoader[Any], positions: list[list[int]]) -> Iterator[Any]:
        """Load examples at some positions to the device, one batch for each list."""
        return self.on_device(load(loader, positions, one_worker=True))
