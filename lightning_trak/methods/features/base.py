"""The base class of all methods over stored gradient features: from a model, checkpoints and a store to scores."""

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import lightning as L
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import Unpack, override

from lightning_trak.checkpoints.of_model import checkpoints_of
from lightning_trak.checkpoints.reading import CheckpointsLike, masks_of
from lightning_trak.checks import require_options, shows_options_of
from lightning_trak.compatibility import original_module
from lightning_trak.features.dtypes import Dtype, feature_dtype
from lightning_trak.features.engines import EngineName
from lightning_trak.features.model import ModelCopy
from lightning_trak.features.passes.options import Featurizing
from lightning_trak.features.passes.pipeline import FeaturePipeline
from lightning_trak.features.passes.target_features import TargetFeatures
from lightning_trak.features.rows import Features
from lightning_trak.features.settings import FeatureSettings
from lightning_trak.features.store import FeatureStore
from lightning_trak.features.store.identity import Contents
from lightning_trak.gradients import ParameterSelection
from lightning_trak.methods.features.scored import ScoredMethod
from lightning_trak.methods.questions import require_ends
from lightning_trak.outputs import ModelOutput
from lightning_trak.outputs.mixin import trained_output
from lightning_trak.projections import Projection, SparseProjection
from lightning_trak.running.data.content import prefix_digests
from lightning_trak.running.data.loading import num_examples
from lightning_trak.running.data.sources import Data, datamodule_of, single_loader
from lightning_trak.running.ranks import Ranks
from lightning_trak.running.strategies import refuse_spawning
from lightning_trak.running.trainers import trainer_of
from lightning_trak.scoring.predict import ScoreModule
from lightning_trak.storage.paths import local_directory


class FeatureOptions(TypedDict, total=False):
    """The keyword arguments of all methods over features, see :class:`~lightning_trak.methods.FeatureMethod`."""

    output: ModelOutput | None
    projection: Projection | None
    parameters: ParameterSelection
    engine: EngineName
    seed: int
    dtype: Dtype | None
    weights_only: bool
    audit: int


class FeatureMethod(ScoredMethod):
    """Attributes a trained model's outputs to its training examples, with features on disk.

    Several methods can share a store, because features do not depend on how they are scored. The model, its mode,
    weights, ``.grad`` and buffers are never changed: all work is done on a copy.

    The arguments are those of :class:`~lightning_trak.TRAK`.
    """

    _shown: ClassVar[tuple[str, ...]] = (
        "model",
        "checkpoints",
        "store",
        "output",
        "settings.projection",
        "settings.dtype",
    )

    def __init__(
        self,
        model: nn.Module,
        checkpoints: CheckpointsLike | None = None,
        store: str | Path | None = None,
        *,
        output: ModelOutput | None = None,
        projection: Projection | None = None,
        parameters: ParameterSelection = None,
        engine: EngineName = "auto",
        seed: int = 0,
        dtype: Dtype | None = None,
        weights_only: bool = True,
        audit: int = 2,
    ) -> None:
        if store is None:
            raise TypeError(f'{type(self).__name__} keeps features on disk: say where, such as store="run/features"')
        self.model = original_module(model)
        self.output = trained_output(self.model, output)
        self.checkpoints = checkpoints_of(self.model, checkpoints, weights_only)
        self._used_masks = masks_of(self.checkpoints)
        self._contents = Contents(self.checkpoints)
        self.store = local_directory(store, "store")
        self.parameters = parameters
        if dtype is None and projection is not None:
            dtype = "float32"
        stored = None if dtype is None else feature_dtype(dtype)
        projection = SparseProjection() if projection is None else projection
        self.settings = FeatureSettings(projection, engine, seed, stored, audit)
        self._train: Data | None = None  # what featurize got last

    @property
    @override
    def used_masks(self) -> Tensor | None:
        return self._used_masks

    def _require_enough(self, num_examples: int, dim: int) -> None:
        """Raise if the scorer needs more training examples than there are. By default any number is enough."""

    @override
    @shows_options_of(FeaturePipeline.featurize)
    def featurize(
        self,
        trainer: L.Trainer | None = None,
        data: Data | None = None,
        shard_size: int | None = None,
        **how: Unpack[Featurizing],
    ) -> None:
        """Compute and store the features of the training set at every checkpoint, as far as the store lacks them.

        So an interrupted call is continued, and the store can grow: by checkpoints, and by examples at the end of the
        data.

        Args:
            trainer: a Trainer whose strategy keeps the whole model on each rank (one device, DDP), or shards it with
                FSDP2 (``ModelParallelStrategy``). None: one on a single device, see
                :func:`~lightning_trak.running.trainers.trainer_of`; then give the data by name:
                ``featurize(data=train_loader)``.
            data: the training data: a DataLoader, map-style Dataset or LightningDataModule (its ``train_dataloader``).
                Every item of the dataset is featurized once, in order. The loader's sampler is not used. Give data
                without random augmentation.
            shard_size: examples per file if the store is new. A rank does a whole file at a time. Default: about 1024,
                or a quarter of the data if that is less.
            **how: ``overwrite``, ``on_nan`` and ``part``, see
                :class:`~lightning_trak.features.passes.options.Featurizing`.

        Raises:
            ValueError: if the store was made with other settings, an example's features are not finite, the strategy
                splits the model in another way, or it shards a model that hooks do not cover.
        """
        require_options(self.featurize, how, Featurizing)
        trainer = trainer_of(trainer)
        for pipeline in self._pipelines():
            pipeline.featurize(trainer, data, shard_size, self._require_enough, **how)
        self._train = data

    def target_features(self, trainer: L.Trainer | None = None, data: Data | None = None) -> list[Features]:
        """The features of targets, projected like those of the store, and rotated if these are integers.

        Their products with those of the store are what :meth:`score` begins with.

        Args:
            trainer: as for :meth:`score`.
            data: one set of targets, as for :meth:`score`.

        Returns:
            On every rank, for each checkpoint, the features of all targets on the CPU. Rows are in the order of their
            dataset.

        Raises:
            FileNotFoundError: if there is no store yet.
            RuntimeError: if featurizing is not complete.
            ValueError: if the store was made with other settings.
        """
        trainer = trainer_of(trainer)
        loader = single_loader(data, "predict", trainer)
        target_features = TargetFeatures(self._pipeline(), trainer)
        (features,) = target_features.make(loader, [range(num_examples(loader))], datamodule_of(data))
        return list(features)

    def self_influence(self, trainer: L.Trainer | None = None) -> Tensor:
        """The score of each training example for itself, the diagonal of ``score(trainer, train)``, from the store.

        Args:
            trainer: as for :meth:`score`. Processes that already run, as after :meth:`featurize`, share the work.

        Returns:
            On every rank a CPU Tensor ``(num_train,)``.

        Raises:
            FileNotFoundError: if there is no store yet.
            RuntimeError: if featurizing is not complete.
            ValueError: if the store was made with other settings, or a Gram matrix is singular.
        """
        trainer = trainer_of(trainer)
        refuse_spawning(trainer)
        scorer, ranks = self.make_scorer(self._open(trainer)), Ranks.of(trainer)
        scorer.fit(trainer.strategy.root_device, ranks)
        return scorer.self_scores(ranks)

    @property
    def skipped(self) -> list[int]:
        """Positions of the training examples that ``featurize(on_nan="skip")`` has left out, in order."""
        return self._open().skipped

    def _open(self, trainer: L.Trainer | None = None) -> FeatureStore:
        """The store of this method, which may lack shards."""
        pipeline = self._pipeline()
        return pipeline.open(pipeline.copy_model(), trainer)

    def open_store(self, trainer: L.Trainer | None = None) -> FeatureStore:
        """The complete store of this method, to read its features.

        Args:
            trainer: as for :meth:`score`.

        Raises:
            FileNotFoundError: if there is no store yet.
            RuntimeError: if featurizing is not complete.
            ValueError: if the store was made with other settings.
        """
        pipeline = self._pipeline()
        return pipeline.open_complete(pipeline.copy_model(), trainer_of(trainer))

    @override
    def label_suspicion(self, trainer: L.Trainer | None = None, train: Data | None = None) -> Tensor:
        """Call :meth:`featurize`, which does nothing if the store is complete; then the size of the self-influence."""
        trainer = trainer_of(trainer)
        self.featurize(trainer, train)
        return self.self_influence(trainer).abs()

    def scorer(self, top_k: int | None = None, largest: bool | None = None) -> ScoreModule:
        """A module for ``trainer.predict(method.scorer(), loader)``. It returns the scores of each batch.

        Args:
            top_k: keep only this many training examples at each end of the scores of a target.
            largest: whether ``top_k`` keeps the highest scores or the lowest; default: both.
        """
        require_ends(top_k, largest)
        pipeline = self._pipeline()
        model = pipeline.copy_model(keep=True)
        store = pipeline.open(model)
        store.require_complete()
        return ScoreModule.of(self.model)(self.make_scorer(store), top_k, largest, model, self.settings, store)

    @override
    def _num_train(self) -> int | None:
        with suppress(FileNotFoundError):
            return FeatureStore.size_of(self.store)
        return None

    @override
    def _has_scored(self, loader: DataLoader[Any]) -> bool:
        with suppress(FileNotFoundError):
            return FeatureStore.is_of(self.store, partial(prefix_digests, loader))
        return True

    @override
    def _model_copy(self) -> ModelCopy:
        pipeline = self._pipeline()
        model = pipeline.copy_model()
        with suppress(FileNotFoundError):  # scores may come from elsewhere
            pipeline.open(model)  # raises if the store, and so the scores, are of other weights
        return model

    @override
    def _pipeline(self) -> FeaturePipeline:
        return self._pipeline_of(self.output, self.store)

    def _pipelines(self) -> Iterator[FeaturePipeline]:
        """What makes all that :meth:`featurize` stores, one after another."""
        yield self._pipeline()

    def _pipeline_of(self, output: ModelOutput, store: Path) -> FeaturePipeline:
        """What makes features of an output."""
        return FeaturePipeline(
            self.model,
            output,
            self.checkpoints,
            self._contents,
            store,
            self.settings,
            self.parameters,
            type(self).__name__,
        )
