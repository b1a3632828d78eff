"""Makes features of training examples, in a store."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import nn
from torch.utils.data import DataLoader

from lightning_trak.checkpoints.base import Checkpoint
from lightning_trak.checkpoints.subsets import require_same_data
from lightning_trak.checks import positive, require_one_of
from lightning_trak.features.engines import EngineName, make_engine
from lightning_trak.features.finiteness import explaining
from lightning_trak.features.fsdp import ANOTHER_STRATEGY, ShardedModelCopy
from lightning_trak.features.model import ModelCopy
from lightning_trak.features.passes.featurize_module import FeaturizeModule
from lightning_trak.features.passes.options import OnNan
from lightning_trak.features.passes.refuted import next_engine, refuted_engine
from lightning_trak.features.passes.sinks import ShardWriter
from lightning_trak.features.passes.skipping import require_finite_or_skipped, require_none_skipped
from lightning_trak.features.passes.work import Samples, default_shard_size, missing_shards, progress
from lightning_trak.features.precision import precision_of
from lightning_trak.features.settings import FeatureSettings
from lightning_trak.features.store import FeatureStore
from lightning_trak.features.store.identity import Contents, identity
from lightning_trak.gradients import ParameterSelection
from lightning_trak.gradients.separable import separable
from lightning_trak.outputs import ModelOutput
from lightning_trak.running.data.annotated import numbered
from lightning_trak.running.data.loading import num_examples
from lightning_trak.running.data.ranges import Range, Stop, share_out
from lightning_trak.running.data.sources import Data, datamodule_of, single_loader
from lightning_trak.running.parts import Part, share
from lightning_trak.running.ranks import Ranks
from lightning_trak.running.stopping import Interruption
from lightning_trak.running.strategies import refuse_spawning, shards_model
from lightning_trak.running.trainers import predict_over
from lightning_trak.texts.printable import counted


class FeaturePipeline:
    """Makes the features of a store with ``trainer.predict``.

    Args:
        model: the trained model, which is never changed.
        output: the scalar output to differentiate.
        checkpoints: the weights, one set per checkpoint.
        contents: the contents of the checkpoints.
        directory: the directory of the store.
        settings: how features are made.
        parameters: which parameters to differentiate, see :func:`~lightning_trak.gradients.select_parameters`.
        user: the name of the method that needs the features, in messages.

    Attributes:
        settings: how features are made.
        user: as given.
    """

    def __init__(
        self,
        model: nn.Module,
        output: ModelOutput,
        checkpoints: Sequence[Checkpoint],
        contents: Contents,
        directory: Path,
        settings: FeatureSettings,
        parameters: ParameterSelection,
        user: str,
    ) -> None:
        self._model = model
        self._output = output
        self._checkpoints = checkpoints
        self._contents = contents
        self._directory = directory
        self.settings = settings
        self._parameters = parameters
        self.user = user

    def copy_model(self, trainer: L.Trainer | None = None, keep: bool = False) -> ModelCopy:
        """Make a copy of the model for differentiation.

        Args:
            trainer: the Trainer that will run the copy. Its strategy may shard it.
            keep: whether to keep the weights of all checkpoints in memory.

        Raises:
            ValueError: if the Trainer's strategy splits the model in a way that cannot be differentiated,
                ``engine="hooks"`` was set and hooks cover no parameter, or ranks have models with other weights.
        """
        sharded = trainer is not None and shards_model(trainer)
        if sharded and self.settings.engine not in ("auto", "hooks"):
            raise ValueError(
                f"engine={self.settings.engine!r} needs whole parameters, but ModelParallelStrategy splits them: use"
                f" engine='auto' or 'hooks', or {ANOTHER_STRATEGY}"
            )
        kind = ShardedModelCopy if sharded else ModelCopy
        digests = [content.digest for content in self._contents.read()]
        model = kind(self._model, self._output, self._checkpoints, digests, self._parameters, keep)
        if self.settings.engine == "hooks":
            make_engine("hooks", model)  # raises before anything runs
        if trainer is not None:
            Ranks.of(trainer).require_same_weights(model.streams)
        return model

    def featurize(
        self,
        trainer: L.Trainer,
        data: Data | None,
        shard_size: int | None,
        require_enough: Callable[[int, int], None],
        overwrite: bool = False,
        on_nan: OnNan | None = None,
        part: Part | None = None,
    ) -> None:
        """Store the features of the training set at every checkpoint. An interrupted call is continued.

        Args:
            trainer: the Trainer that runs the work.
            data: the training data.
            shard_size: examples per file if the store is new; None: about 1024, or a quarter of the data.
            require_enough: called with the number of examples and the number of features; raises if there are too few
                examples.
            overwrite: see :class:`~lightning_trak.features.passes.options.Featurizing`.
            on_nan: see there.
            part: see there.

        Raises:
            ValueError: if the store was made with other settings, an example's features are not finite, or the
                strategy splits the model in a way that cannot be differentiated.
        """
        require_one_of("on_nan", on_nan, ("raise", "skip", None))
        share([], part)  # raises before the work if there is no such part
        refuse_spawning(trainer)
        shards_model(trainer)
        loader = single_loader(data, "fit", trainer)
        model = self.copy_model(trainer)
        count = num_examples(loader)
        self._require_own_subsets(count, None)
        depends_on, sample = self._identity(model, trainer), Samples(loader)
        digests = sample(count)
        self._require_own_subsets(count, None if digests is None else digests[0])
        require_enough(count, self.settings.dim(model.shapes))
        if self._output.numbered:
            loader = numbered(loader)
        default = default_shard_size(count, loader)
        shard_size = default if shard_size is None else positive("shard_size", shard_size)
        store = FeatureStore(
            self._directory,
            depends_on,
            count,
            shard_size,
            user=self.user,
            sample=sample,
            overwrite=overwrite,
        )
        try:
            self._require_unchanged(store, trainer)
            self._fill(store, model, trainer, data, loader, on_nan, part)
        finally:
            store.release()
        Ranks.of(trainer).barrier()  # so that the next call may let the store grow

    def _fill(
        self,
        store: FeatureStore,
        model: ModelCopy,
        trainer: L.Trainer,
        data: Data | None,
        loader: DataLoader[Any],
        on_nan: OnNan | None,
        part: Part | None,
    ) -> None:
        """Compute what a store lacks, or a part of it; see :meth:`featurize`."""
        self._require_engine(store, model.sharded)
        if on_nan == "raise":
            require_none_skipped(store)
        elif on_nan is None:
            on_nan = "skip" if store.skipped else "raise"
        needed = {"context": model.output.context_size, "projection": self.settings.projection.sample_size}
        extras = [name for name, size in needed.items() if size]
        self._announce(store, model, extras, part)
        datamodule, loaded = datamodule_of(data), separable(loader)
        engine: EngineName | None = None
        while any(missing := missing_shards(store, extras, part)):
            jobs, stop = self._shard_jobs(missing, store), Stop()
            interruption = Interruption(stop)
            with explaining(model, loader), ShardWriter(store, on_nan == "skip", stop) as writer:
                module = FeaturizeModule.of(trainer)(
                    writer, "Featurizing", loaded, stop, model, self.settings, store, datamodule, loaded, engine
                )
                predict_over(trainer, module, share_out(loaded, jobs, trainer, model.sharded, stop), interruption)
            ranks = Ranks.of(trainer)  # its processes run now
            interruption.raise_if_received(ranks, lambda: progress(store))
            wrong = refuted_engine(module, ranks)
            if wrong is None:
                with explaining(model, loader):
                    require_finite_or_skipped(writer.not_finite, on_nan, model, store, ranks)
                break
            engine = self._next_engine(*wrong, ranks, store)
        if part is None:
            store.require_complete()
        elif not store.complete:
            rank_zero_info(f"{self.user}: part {part} is done; {progress(store)}")

    def _announce(self, store: FeatureStore, model: ModelCopy, extras: Sequence[str], part: Part | None) -> None:
        """Log what there is to do."""
        total = sum(parameter.numel() for parameter in self._model.parameters())
        rank_zero_info(
            f"{self.user}: {counted(store.num_examples, 'example')} at"
            f" {counted(len(store.first), 'checkpoint')}, gradients of {model.size} of"
            f" {counted(total, 'parameter')}, {type(self.settings.projection).__name__} to"
            f" {counted(self.settings.dim(model.shapes), 'feature')} in {store.dtype.name}:"
            f" {sum(map(len, missing_shards(store, extras, part)))} of"
            f" {counted(len(store.first) * store.num_shards, 'shard')} to do"
        )
        if extras and store.begun_with < store.num_examples:
            rank_zero_info(
                f"{self.user}: the {' and the '.join(extras)} stay fitted to the {store.begun_with} examples that the"
                " store began with"
            )

    def _shard_jobs(self, missing: Sequence[Sequence[int]], store: FeatureStore) -> list[list[Range]]:
        """The ranges of some shards at each checkpoint."""
        return [
            [Range(number, store.shard(number), self.settings.draw(c, store.shard(number))) for number in numbers]
            for c, numbers in enumerate(missing)
        ]

    def open(self, model: ModelCopy, trainer: L.Trainer | None = None) -> FeatureStore:
        """Open the store for reading, and check that it was made with this model and these settings.

        Args:
            model: the copy from :meth:`copy_model`.
            trainer: the Trainer, whose precision must be that of the store; None: the precision is not checked.

        Raises:
            FileNotFoundError: if there is no store yet.
            ValueError: if it was made with other settings.
        """
        depends_on = self._identity(model, trainer)
        store = FeatureStore(self._directory, depends_on, None, read_only=True, user=self.user)
        self._require_unchanged(store, trainer)
        self._require_own_subsets(store.num_examples, store.data)
        return store

    def open_complete(self, model: ModelCopy, trainer: L.Trainer) -> FeatureStore:
        """Open the store for scoring, and check that it is complete.

        Raises:
            FileNotFoundError: if there is no store yet.
            RuntimeError: if featurizing is not complete.
            ValueError: if it was made with other settings, or the Trainer spawns processes.
        """
        refuse_spawning(trainer)
        store = self.open(model, trainer)
        store.require_complete()
        self._require_engine(store, model.sharded)
        return store

    def _identity(self, model: ModelCopy, trainer: L.Trainer | None) -> dict[str, Any]:
        found = identity(model, self._output, self.settings, self._contents)
        if trainer is not None:
            found["precision"] = precision_of(trainer, self._output)
        return found

    def _require_unchanged(self, store: FeatureStore, trainer: L.Trainer | None) -> None:
        """Check that the store is of the weights that the model has now, if these are taken and it has any."""
        if any(checkpoint.live for checkpoint in self._checkpoints) and store.is_of_others:
            several = trainer is not None and trainer.world_size > 1
            also = ". Or this process has made another model than the others: seed them alike" if several else ""
            raise ValueError(
                f'store "{self._directory}" was made of other weights than the model has now. Without checkpoints=, the'
                " model's current weights are taken, and they have changed: it was trained further, loaded, or made"
                " anew. Use another store for the present weights, or overwrite=True in featurize, or give those of the"
                f" store by checkpoints={also}"
            )

    def _require_own_subsets(self, num_examples: int, data: str | None) -> None:
        """Check that models which have seen a part of a training set have seen a part of this one."""
        for checkpoint in self._checkpoints:
            if checkpoint.subset is not None:
                require_same_data(checkpoint.subset, num_examples, data, checkpoint.name)

    def _require_engine(self, store: FeatureStore, sharded: bool) -> None:
        wanted, engine, refuted = self.settings.engine, store.settle_engine(), store.refuted_engines()
        if wanted in refuted:
            raise ValueError(
                f'engine={wanted!r} got a gradient wrong when store "{store.directory}" was made:'
                f" {refuted[wanted]}. Use engine='auto', which continues with {engine!r}"
            )
        if sharded and wanted == "auto" and engine not in (None, "hooks"):
            raise ValueError(
                f'store "{store.directory}" was begun with engine {engine!r}, which needs whole parameters, but'
                " ModelParallelStrategy splits them: use strategy='ddp' or a single device, or another directory"
            )

    def _next_engine(self, used: EngineName, reason: str, ranks: Ranks, store: FeatureStore) -> EngineName:
        """The engine that replaces one that is wrong. The store keeps a note of that."""
        following = next_engine(used, reason, self.user, "all features of the store")
        if used not in store.refuted_engines():
            store.refute_engine(used, reason, following)
            store.remove_extra("projection")  # it was fitted to gradients of the wrong engine
        ranks.barrier()
        return cast(EngineName, store.settle_engine())
