"""The base class of all methods over stored gradient features: from a model, checkpoints and a store to scores."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, overload

import lightning as L
from torch import Tensor, nn
from torch.utils.data import DataLoader
from typing_extensions import Unpack, override

from lightning_trak.checkpoints.reading import masks_of, resolve_checkpoints
from lightning_trak.checks import positive
from lightning_trak.compatibility import original_module
from lightning_trak.features.dtypes import Dtype, feature_dtype
from lightning_trak.features.engines import EngineName
from lightning_trak.features.featurizing import Featurizing
from lightning_trak.features.identity import Contents
from lightning_trak.features.pipeline import FeaturePipeline
from lightning_trak.features.rows import Features
from lightning_trak.features.settings import FeatureSettings
from lightning_trak.features.store import FeatureStore
from lightning_trak.gradients import ParameterSelection
from lightning_trak.methods.base import Method
from lightning_trak.methods.examples import Examples
from lightning_trak.methods.influence.passes import Passes, without_gradients
from lightning_trak.methods.options import Checkpoints
from lightning_trak.methods.questions import Positions, Question, is_positions, target_rows, train_columns
from lightning_trak.methods.rescoring import ExactScores, SecondStage
from lightning_trak.outputs import ModelOutput
from lightning_trak.outputs.mixin import target_output, trained_output
from lightning_trak.projections import Projection, SparseProjection
from lightning_trak.running.data import Data, as_loaders, single_loader
from lightning_trak.running.loaders import holds_several
from lightning_trak.running.ranks import Ranks
from lightning_trak.running.strategies import refuse_spawning, require_whole_parameters, shards_model
from lightning_trak.scoring.base import Scorer, Scores
from lightning_trak.scoring.predict import ScoreModule
from lightning_trak.scoring.targets import Kept, score_targets
from lightning_trak.scoring.topk import BothEnds, TopK
from lightning_trak.storage.paths import local_directory


class FeatureMethod(Method):
    """Attributes a trained model's outputs to its training examples, with features on disk.

    Several methods can share a store, because features do not depend on how they are scored. The model, its mode,
    weights, ``.grad`` and buffers are never changed: all work is done on a copy.

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
        dtype: Dtype | None = None,
        weights_only: bool = True,
        audit: int = 2,
    ) -> None:
        self.model = original_module(model)
        self.output = trained_output(self.model, output)
        self.checkpoints = resolve_checkpoints(checkpoints, weights_only=weights_only)
        self._used_masks = masks_of(self.checkpoints)
        self._contents = Contents(self.checkpoints)
        self.store = local_directory(store, "store")
        self.parameters = parameters
        # At 8 KiB an example, many features of few bits lose less than fewer of more bits: docs/faithfulness.md.
        dtype = dtype or ("int4" if projection is None else "float32")
        projection = SparseProjection() if projection is None else projection
        self.settings = FeatureSettings(projection, engine, seed, feature_dtype(dtype), audit)
        self._train: Data | None = None  # what featurize got last

    @property
    @override
    def used_masks(self) -> Tensor | None:
        return self._used_masks

    @abstractmethod
    def make_scorer(self, store: FeatureStore) -> Scorer:
        """Make the scorer of this method for a complete store."""

    def _exact_scores(self) -> ExactScores:
        """How candidates are scored exactly.

        Raises:
            ValueError: if this method cannot do this.
        """
        raise ValueError(
            f"{type(self).__name__} cannot rescore: its scores are products of stored features. They are exact with"
            " IdentityProjection() in another store; TRAK can rescore"
        )

    def _require_trainer(self, trainer: L.Trainer) -> None:
        """Raise if the Trainer cannot run this method. By default any can."""

    def _require_enough(self, num_examples: int, dim: int) -> None:
        """Raise if the scorer needs more training examples than there are. By default any number is enough."""

    def attribute(self, trainer: L.Trainer, train: Data, targets: Data) -> Tensor:
        """Call :meth:`featurize`, which does nothing if the store is complete, and then :meth:`score`.

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
            raise ValueError(f"attribute takes one set of targets, got {len(scores)} loaders; use score for several")
        return scores

    def featurize(
        self, trainer: L.Trainer, data: Data, shard_size: int | None = None, **how: Unpack[Featurizing]
    ) -> None:
        """Compute and store the features of the training set at every checkpoint, as far as the store lacks them.

        So an interrupted call is continued, and the store can grow: by checkpoints, and by examples at the end of the
        data.

        Args:
            trainer: a Trainer whose strategy keeps the whole model on each rank (one device, DDP), or shards it with
                FSDP2 (``ModelParallelStrategy``).
            data: the training data: a DataLoader, map-style Dataset or LightningDataModule (its ``train_dataloader``).
                Every item of the dataset is featurized once, in order. The loader's sampler is not used. Give data
                without random augmentation.
            shard_size: examples per file if the store is new. A rank does a whole file at a time. Default: about 1024,
                or a quarter of the data if that is less.
            **how: ``overwrite``, ``on_nan`` and ``part``, see
                :class:`~lightning_trak.features.featurizing.Featurizing`.

        Raises:
            ValueError: if the store was made with other settings, an example's features are not finite, the strategy
                splits the model in another way, or it shards a model that hooks do not cover.
        """
        self._pipeline().featurize(trainer, data, shard_size, self._require_enough, **how)
        self._train = data

    @overload
    def score(
        self,
        trainer: L.Trainer,
        data: Data,
        top_k: None = None,
        largest: bool | None = True,
        rescore: None = None,
        train: Positions | None = None,
        **question: Unpack[Question],
    ) -> Tensor: ...

    @overload
    def score(
        self,
        trainer: L.Trainer,
        data: Data,
        top_k: int,
        largest: bool = True,
        rescore: int | None = None,
        train: Data | Positions | None = None,
        **question: Unpack[Question],
    ) -> TopK: ...

    @overload
    def score(
        self,
        trainer: L.Trainer,
        data: Data,
        top_k: int,
        largest: None,
        rescore: int | None = None,
        train: Data | Positions | None = None,
        **question: Unpack[Question],
    ) -> BothEnds: ...

    @overload
    def score(
        self,
        trainer: L.Trainer,
        data: Data | Sequence[DataLoader[Any]],
        top_k: int | None = None,
        largest: bool | None = True,
        rescore: int | None = None,
        train: Data | Positions | None = None,
        **question: Unpack[Question],
    ) -> Any: ...

    def score(
        self,
        trainer: L.Trainer,
        data: Data | Sequence[DataLoader[Any]],
        top_k: int | None = None,
        largest: bool | None = True,
        rescore: int | None = None,
        train: Data | Positions | None = None,
        **question: Unpack[Question],
    ) -> Any:
        """Score targets against training examples.

        The first lines of the method's class say what a positive score means, and in which unit scores are.

        Args:
            trainer: as for :meth:`featurize`. The strategy must not spawn its processes.
            data: the targets: a DataLoader, a sequence of them, a map-style Dataset or a LightningDataModule (its
                ``predict_dataloader``).
            top_k: keep only this many training examples for each target. The full matrix is then never in memory.
            largest: whether ``top_k`` keeps the highest scores (proponents) or the lowest (opponents); None: both, from
                one pass.
            rescore: score this many candidates of each target exactly, those that are best by the stored features, and
                keep the best ``top_k`` of them. Only :class:`~lightning_trak.TRAK` can do this; see
                :class:`~lightning_trak.methods.rescoring.ExactScores`. It takes several passes over the training data
                at each checkpoint, and a Trainer whose strategy keeps the model whole.
            train: the positions of the training examples to score, as integers; default: all. With ``rescore`` the
                training data; default: the data that this object's last :meth:`featurize` got.
            **question: ``output``, ``aggregate``, ``groups`` and ``train_groups``, see
                :class:`~lightning_trak.methods.questions.Question`.

        Returns:
            On every rank a CPU Tensor ``(num_targets, num_train)``, or with ``top_k`` a
            :class:`~lightning_trak.scoring.TopK`; with ``rescore`` its values are the exact scores. With
            ``largest=None`` it is a :class:`~lightning_trak.scoring.BothEnds`. Rows are in the order of the targets'
            dataset, or a row for each of their groups; columns are the training examples, those in ``train`` in the
            given order, or a column for each of their groups. With ``train_groups`` the indices of ``top_k`` are the
            numbers of groups. For several loaders, a list of these.

        Raises:
            FileNotFoundError: if there is no store yet.
            RuntimeError: if featurizing is not complete.
            ValueError: if the store was made with other settings, a Gram matrix is singular, or groups or positions do
                not fit the data. With ``rescore``: if the method cannot rescore, ``train`` is not known, or other data
                than the store's, or an exact score cannot be computed.
        """
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        if top_k is None and largest is None:
            raise ValueError("largest=None keeps both ends of the scores: say how many of each with top_k=")
        self._require_trainer(trainer)
        if rescore is not None and (question or largest is None):
            wrong = next(iter(question), "largest=None").removesuffix("=None")
            raise ValueError(f"rescore keeps one end of the scores of each target: leave {wrong} out, or rescore")
        second = self._second_stage(
            trainer, top_k, rescore, None if is_positions(train) else cast("Data | None", train)
        )
        output = target_output(question.get("output"), self.output)
        if output is not None and shards_model(trainer):
            raise ValueError(
                "output= needs whole parameters, but ModelParallelStrategy splits them: use strategy='ddp' or a single"
                " device"
            )
        loaders, pipeline = as_loaders(data, "predict", trainer), self._pipeline()
        model = pipeline.copy_model(trainer)
        store = pipeline.open_complete(model, trainer)
        positions = train if is_positions(train) else None
        columns = train_columns(positions, question.get("train_groups"), store.num_examples)
        rows = target_rows(question, [len(cast(Any, loader.dataset)) for loader in loaders])
        scorer, datamodule = self.make_scorer(store), data if isinstance(data, L.LightningDataModule) else None
        if second is not None:
            second.require_possible(store, model.size)
        results: Sequence[Scores] = [
            score_targets(
                trainer,
                loader,
                pipeline,
                model,
                store,
                scorer,
                datamodule,
                Kept(rescore or top_k, largest, sums, None if columns is None else columns.sums),
                output,
            )
            for loader, sums in zip(loaders, rows, strict=True)
        ]
        if columns is not None:
            results = [columns.named(result) for result in results]
        if second is not None:
            targets = [Examples(loader, "predict", trainer, datamodule) for loader in loaders]
            with without_gradients():
                own, settings = pipeline.copy_model(trainer), self.settings
                passes = Passes(own, settings.seed, trainer, second.train, settings.engine)
                results = second.best(passes, store, targets, cast(Sequence[TopK], results), bool(largest))
        return results if holds_several(data) or len(results) > 1 else results[0]

    def _second_stage(
        self, trainer: L.Trainer, top_k: int | None, rescore: int | None, train: Data | None
    ) -> SecondStage | None:
        """What scores candidates again, if that is asked for; refuse what cannot be done before any work.

        Raises:
            ValueError: if it cannot be done.
        """
        if rescore is None:
            if train is not None:
                raise ValueError(
                    "without rescore, train takes positions of training examples as integers, got a"
                    f" {type(train).__name__}"
                )
            return None
        exact = self._exact_scores()
        if top_k is None or positive("rescore", rescore) < top_k:
            raise ValueError(f"rescore needs a top_k of at most rescore={rescore}, got top_k={top_k}")
        require_whole_parameters(trainer)
        data = self._train if train is None else train
        if data is None:
            raise ValueError(
                "rescore needs the training data: pass train=, the same data as to featurize, or call featurize of this"
                " object first, which does nothing if the store is complete"
            )
        return SecondStage(exact, Examples(data, "fit", trainer), top_k)

    def target_features(self, trainer: L.Trainer, data: Data) -> list[Features]:
        """The features of targets, projected like those of the store. :meth:`score` compares the two.

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
        loader, pipeline = single_loader(data, "predict", trainer), self._pipeline()
        model = pipeline.copy_model(trainer)
        store = pipeline.open_complete(model, trainer)
        examples = range(len(cast(Any, loader.dataset)))
        datamodule = data if isinstance(data, L.LightningDataModule) else None
        (features,) = pipeline.target_features(trainer, loader, [examples], model, store, datamodule)
        return list(features)

    def self_influence(self, trainer: L.Trainer) -> Tensor:
        """The score of each training example for itself, computed only from the stored features.

        It is the diagonal of ``score(trainer, train)``. Examples with a high self-influence are learned on their own,
        not from what they share with others. They are often rare or have a wrong label (Koh and Liang 2017, arXiv
        1703.04730, section 5.4; Pruthi et al. 2020, arXiv 2002.08484, section 4.1). Cosines of gradients are of no use
        here, because they are all the same.

        Args:
            trainer: as for :meth:`score`. Its device computes. If its processes already run, as after
                :meth:`featurize`, they share the work; otherwise each does all of it.

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

    @property
    def skipped(self) -> list[int]:
        """Positions of the training examples that ``featurize(on_nan="skip")`` has left out, in order."""
        pipeline = self._pipeline()
        return pipeline.open(pipeline.copy_model()).skipped

    def scorer(self, top_k: int | None = None, largest: bool | None = True) -> ScoreModule:
        """A module for ``trainer.predict(method.scorer(), loader)``. It returns the scores of each batch.

        Args:
            top_k: keep only this many training examples for each target.
            largest: whether ``top_k`` keeps the highest scores or the lowest; None: both.
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
