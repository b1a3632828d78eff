"""What methods over stored gradient features share: a model, its checkpoints and a store in, attributions out."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_trak.checkpoints.reading import CheckpointSource, resolve_checkpoints
from lightning_trak.compatibility import original_module
from lightning_trak.features.engines import EngineName
from lightning_trak.features.identity import Contents
from lightning_trak.features.pipeline import FeaturePipeline
from lightning_trak.features.rows import Features
from lightning_trak.features.settings import FeatureSettings
from lightning_trak.features.store import FeatureStore
from lightning_trak.gradients import ParameterSelection
from lightning_trak.methods.base import Method
from lightning_trak.outputs import ModelOutput
from lightning_trak.outputs.mixin import declared_output
from lightning_trak.projections import Projection, SparseProjection
from lightning_trak.running.data import Data, as_loaders, single_loader
from lightning_trak.running.loaders import holds_several
from lightning_trak.running.ranks import Ranks
from lightning_trak.running.strategies import refuse_spawning
from lightning_trak.scoring.base import Scorer
from lightning_trak.scoring.predict import ScoreModule
from lightning_trak.scoring.targets import score_targets
from lightning_trak.storage.paths import local_directory

Checkpoints = Sequence[CheckpointSource] | CheckpointSource  # in this order a command line can tell them apart


class FeatureOptions(TypedDict, total=False):
    """Keyword arguments of every method over features, see :class:`FeatureMethod`."""

    output: ModelOutput | None
    projection: Projection | None
    parameters: ParameterSelection
    engine: EngineName
    seed: int
    dtype: torch.dtype
    weights_only: bool
    audit: int


class FeatureMethod(Method):
    """Attributes a trained model's outputs to its training examples by features on disk.

    Several methods can share a store, since features do not depend on how they are scored. The model, its mode,
    weights, ``.grad`` and buffers are never touched: the work is done on a copy.

    The arguments are those of :class:`~lightning_trak.TRAK`.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoints: Checkpoints,
        store: str | Path,
        *,
        output: ModelOutput | None = None,
        projection: Projection | None = None,
        parameters: ParameterSelection = None,
        engine: EngineName = "auto",
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        weights_only: bool = True,
        audit: int = 2,
    ) -> None:
        self.model = original_module(model)
        self.output = declared_output(self.model, output)
        self.checkpoints = resolve_checkpoints(checkpoints, weights_only=weights_only)
        self._contents = Contents(self.checkpoints)
        self.store = local_directory(store, "store")
        self.parameters = parameters
        self.settings = FeatureSettings(
            SparseProjection() if projection is None else projection, engine, seed, dtype, audit
        )

    @abstractmethod
    def make_scorer(self, store: FeatureStore) -> Scorer:
        """What scores complete features as this method does."""

    def _require_enough(self, num_examples: int, dim: int) -> None:
        """Refuse to featurize too few training examples for what scores them; by default any number will do."""

    def attribute(self, trainer: L.Trainer, train: Data, targets: Data) -> Tensor:
        """:meth:`featurize`, which does nothing if the store is complete, and :meth:`score`.

        Args:
            trainer: as for :meth:`featurize` and :meth:`score`.
            train: the training data, as for :meth:`featurize`.
            targets: one set of targets, as for :meth:`score`.

        Returns:
            On every rank a CPU Tensor ``(num_targets, num_train)``.
        """
        self.featurize(trainer, train)
        scores = self.score(trainer, targets)
        if not isinstance(scores, Tensor):
            raise ValueError(f"attribute takes one set of targets, got {len(scores)} loaders; use score")
        return scores

    def featurize(self, trainer: L.Trainer, data: Data, shard_size: int | None = None) -> None:
        """Compute and store the features of the training set at every checkpoint; continues where it was interrupted.

        Args:
            trainer: any Trainer whose strategy keeps the model whole on each rank (one device, DDP) or shards it as
                FSDP2 does (``ModelParallelStrategy``).
            data: the training data: a DataLoader, map-style Dataset or LightningDataModule (its ``train_dataloader``).
                Every item of the dataset is featurized once, in order, whatever the loader's sampler does. Give data
                without random augmentation.
            shard_size: examples per file, when the store is new; a rank's unit of work. Default: about 1024.

        Raises:
            ValueError: if the store was made with other settings, an example's features are not finite, or the
                strategy splits the model in another way, or one that hooks do not cover.
        """
        self._pipeline().featurize(trainer, data, shard_size, self._require_enough)

    def score(
        self, trainer: L.Trainer, data: Data | Sequence[DataLoader[Any]], top_k: int | None = None, largest: bool = True
    ) -> Any:
        """Score every target against every training example.

        The first lines of the method's class say what a positive score means, and in which unit it is.

        Args:
            trainer: as for :meth:`featurize`; the strategy must not spawn its processes.
            data: the targets: a DataLoader, a sequence of them, a map-style Dataset or a LightningDataModule (its
                ``predict_dataloader``).
            top_k: keep only this many training examples for each target; the full matrix then never exists.
            largest: whether ``top_k`` keeps the highest scores (proponents) or the lowest (opponents).

        Returns:
            On every rank a CPU Tensor ``(num_targets, num_train)``, or with ``top_k`` a
            :class:`~lightning_trak.scoring.TopK`; rows in the order of the targets' dataset. A list of them for
            several loaders.

        Raises:
            FileNotFoundError: if there is no store yet.
            RuntimeError: if featurizing is not complete.
            ValueError: if the store was made with other settings, or a Gram matrix is singular.
        """
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        loaders, pipeline = as_loaders(data, "predict", trainer), self._pipeline()
        model = pipeline.copy_model(trainer)
        store = pipeline.open_complete(model, trainer)
        scorer, datamodule = self.make_scorer(store), data if isinstance(data, L.LightningDataModule) else None
        results = [
            score_targets(trainer, loader, pipeline, model, store, scorer, datamodule, top_k, largest)
            for loader in loaders
        ]
        return results if holds_several(data) or len(results) > 1 else results[0]

    def target_features(self, trainer: L.Trainer, data: Data) -> list[Features]:
        """What :meth:`score` compares with the store: the features of targets, projected as those of the store are.

        Args:
            trainer: as for :meth:`score`.
            data: one set of targets, as for :meth:`score`.

        Returns:
            On every rank the CPU features of all targets at each checkpoint, rows in the order of their dataset.

        Raises:
            FileNotFoundError: if there is no store yet.
            RuntimeError: if featurizing is not complete.
            ValueError: if the store was made with other settings.
        """
        loader, pipeline = single_loader(data, "predict", trainer), self._pipeline()
        model = pipeline.copy_model(trainer)
        store = pipeline.open_complete(model, trainer)
        examples = range(len(cast(Any, loader.dataset)))
        datamodule = data if isinstance(data, L.LightningDataModule) else None
        (features,) = pipeline.target_features(trainer, loader, [examples], model, store, datamodule)
        return list(features)

    def self_influence(self, trainer: L.Trainer) -> Tensor:
        """The score of each training example at itself, from the stored features alone.

        It is the diagonal of ``score(trainer, train)``. Examples with a high one are fitted by themselves, not by what
        they share with others: rare ones, and those with a wrong label (Koh and Liang 2017, arXiv 1703.04730, section
        5.4; Pruthi et al. 2020, arXiv 2002.08484, section 4.1). Cosines of gradients are of no use here: they are all
        the same.

        Args:
            trainer: as for :meth:`score`; its device computes. Processes share the work if they run already, as after
                :meth:`featurize`; else each does all of it.

        Returns:
            On every rank a CPU Tensor ``(num_train,)``.

        Raises:
            FileNotFoundError: if there is no store yet.
            RuntimeError: if featurizing is not complete.
            ValueError: if the store was made with other settings, or a Gram matrix is singular.
        """
        refuse_spawning(trainer)
        pipeline, ranks = self._pipeline(), Ranks.of(trainer)
        scorer = self.make_scorer(pipeline.open(pipeline.copy_model(), trainer))
        scorer.fit(trainer.strategy.root_device, ranks)
        return scorer.self_scores(ranks)

    def scorer(self, top_k: int | None = None, largest: bool = True) -> ScoreModule:
        """A module for ``trainer.predict(method.scorer(), loader)``: scores for each batch as the loader yields it.

        Args:
            top_k: keep only this many training examples for each target.
            largest: whether ``top_k`` keeps the highest scores or the lowest.
        """
        pipeline = self._pipeline()
        model = pipeline.copy_model(keep=True)
        store = pipeline.open(model)
        store.require_complete()
        return ScoreModule(self.make_scorer(store), top_k, largest, model, self.settings, store)

    def _pipeline(self) -> FeaturePipeline:
        return FeaturePipeline(
            self.model,
            self.output,
            self.checkpoints,
            self._contents,
            self.store,
            self.settings,
            self.parameters,
            type(self).__name__,
        )
