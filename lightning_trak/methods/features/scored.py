"""Scores targets against stored features, and answers what users ask of scores."""

from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, cast, overload

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from typing_extensions import Unpack

from lightning_trak.checks import positive, require_options, shows_options_of
from lightning_trak.features.passes.target_features import TargetFeatures
from lightning_trak.features.settings import FeatureSettings
from lightning_trak.methods.examples import Examples
from lightning_trak.methods.features.rescoring import ExactScores, SecondStage
from lightning_trak.methods.influence.passes import Passes, without_gradients
from lightning_trak.methods.predictions import with_predictions
from lightning_trak.methods.questions import (
    AttributedQuestion,
    Positions,
    Question,
    is_positions,
    require_ends,
    require_interval,
    target_rows,
    train_columns,
)
from lightning_trak.methods.token_scores import TokenMethod
from lightning_trak.methods.tokens import target_loaders
from lightning_trak.outputs.mixin import target_output
from lightning_trak.running.data.loaders import holds_several, like
from lightning_trak.running.data.loading import batch_size_of, num_examples
from lightning_trak.running.data.sources import Data, datamodule_of
from lightning_trak.running.strategies import require_whole_parameters, shards_model
from lightning_trak.running.trainers import trainer_of
from lightning_trak.scoring.base import Scorer
from lightning_trak.scoring.intervals import Interval, bounds, with_bounds
from lightning_trak.scoring.newton.trak import TRAKScorer
from lightning_trak.scoring.targets import Kept, Others, score_targets
from lightning_trak.scoring.topk import BothEnds, Scores, TopK, all_indices


class ScoredMethod(TokenMethod):
    """What all methods over stored features share once the features are there: from targets to scores."""

    settings: FeatureSettings

    @abstractmethod
    def featurize(
        self, trainer: L.Trainer | None = None, data: Data | None = None, shard_size: int | None = None
    ) -> None:
        """Compute and store the features of the training set."""

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

    def _attribute(
        self,
        trainer: L.Trainer,
        train: Data,
        targets: Data,
        top_k: int | None,
        largest: bool | None,
        interval: float | None,
        question: AttributedQuestion,
    ) -> Scores | Interval:
        """Call :meth:`featurize`, which does nothing if the store is complete, and then :meth:`score`."""
        asked: Any = dict(question)
        candidates = asked.pop("candidates", None)
        # What cannot be answered is refused before the features are made.
        output = target_output(asked.get("output"), self.output)
        columns = Examples(train if candidates is None else candidates, "fit", trainer)
        train_columns(None, asked.get("train_groups"), len(columns))
        (rows,) = target_rows(question, [len(Examples(targets, "predict", trainer, output=output))])
        require_interval(interval, rows)
        if holds_several(targets):  # no more than one, or they were refused by now
            (targets,) = cast(Any, targets)
        self.featurize(trainer, train)
        found = self.score(trainer, targets, top_k, largest, train=candidates, interval=interval, **asked)
        return cast("Scores | Interval", found)

    @overload
    def score(
        self,
        trainer: L.Trainer | None = None,
        data: Data | None = None,
        top_k: None = None,
        largest: None = None,
        rescore: None = None,
        train: Data | Positions | None = None,
        interval: None = None,
        **question: Unpack[Question],
    ) -> Tensor: ...

    @overload
    def score(
        self,
        trainer: L.Trainer | None = None,
        data: Data | None = None,
        *,
        top_k: int,
        largest: None = None,
        rescore: int | None = None,
        train: Data | Positions | None = None,
        interval: None = None,
        **question: Unpack[Question],
    ) -> BothEnds: ...

    @overload
    def score(
        self,
        trainer: L.Trainer | None = None,
        data: Data | None = None,
        *,
        top_k: int,
        largest: bool,
        rescore: int | None = None,
        train: Data | Positions | None = None,
        interval: None = None,
        **question: Unpack[Question],
    ) -> TopK: ...

    @overload
    def score(
        self,
        trainer: L.Trainer | None = None,
        data: Data | None = None,
        top_k: int | None = None,
        largest: bool | None = None,
        rescore: None = None,
        train: Data | Positions | None = None,
        *,
        interval: float,
        **question: Unpack[Question],
    ) -> Interval: ...

    @overload
    def score(
        self,
        trainer: L.Trainer | None = None,
        data: Data | Sequence[DataLoader[Any]] | None = None,
        top_k: int | None = None,
        largest: bool | None = None,
        rescore: int | None = None,
        train: Data | Positions | None = None,
        interval: float | None = None,
        **question: Unpack[Question],
    ) -> Any: ...

    @shows_options_of(None)
    def score(
        self,
        trainer: L.Trainer | None = None,
        data: Data | Sequence[DataLoader[Any]] | None = None,
        top_k: int | None = None,
        largest: bool | None = None,
        rescore: int | None = None,
        train: Data | Positions | None = None,
        interval: float | None = None,
        **question: Unpack[Question],
    ) -> Any:
        """Score targets against training examples.

        The first lines of the method's class say what a positive score means, and in which unit scores are.

        Args:
            trainer: as for :meth:`featurize`. The strategy must not spawn its processes.
            data: the targets: a DataLoader, a sequence of them, a map-style Dataset or a LightningDataModule (its
                ``predict_dataloader``).
            top_k: keep only this many training examples with the highest scores of each target (proponents), and as
                many with the lowest (opponents), in one pass. The full matrix is then never in memory. Of equal scores,
                the first positions are kept.
            largest: whether ``top_k`` keeps only the highest scores, or only the lowest; default: both.
            rescore: score this many candidates at each end exactly, those that are best by the stored features, and
                keep the best ``top_k`` of them. Only :class:`~lightning_trak.TRAK` can do this; see
                :class:`~lightning_trak.methods.features.rescoring.ExactScores`. It takes several passes over the
                training data at each checkpoint, and a Trainer whose strategy keeps the model whole.
            train: the examples to score the targets against; default: all training examples. Positions of some of them,
                as integers; or other examples, as data: candidates for training, which are scored as if they were added
                to the training set, with the curvature of the store. Their features are made a block at a time, again
                for each block of targets, and are not kept. With ``rescore`` the training data themselves, which it
                reads again; default: the data that this object's last :meth:`featurize` got.
            interval: confidence level of an interval for each mean or sum over targets, by bootstrap over the targets
                of its group. It needs the scores of all targets for the columns that are kept, so that these must be
                few: by ``top_k``, positions in ``train`` or ``train_groups``. With ``top_k`` the gradients of targets
                are made a second time.
            **question: ``output``, ``aggregate``, ``groups`` and ``train_groups``, see
                :class:`~lightning_trak.methods.questions.Question`.

        Returns:
            On every rank a CPU Tensor ``(num_targets, num_train)``, or with ``top_k`` a
            :class:`~lightning_trak.scoring.BothEnds`: ``.proponents`` and ``.opponents``, each with ``.values`` and
            ``.indices``, ``(num_targets, top_k)``. ``.values`` and ``.indices`` of the whole are those of the
            proponents. With ``largest`` it is a :class:`~lightning_trak.scoring.TopK`, of that end alone. With
            ``rescore`` the values are the exact scores. Rows are in the order of the targets'
            dataset, or a row for each of their groups; columns are the training examples, those in ``train`` in the
            given order, or a column for each of their groups. With ``train_groups`` the indices of ``top_k`` are the
            numbers of groups. With ``interval`` an :class:`~lightning_trak.scoring.Interval` of these. For
            several loaders, a list of these.

        Raises:
            FileNotFoundError: if there is no store yet.
            RuntimeError: if featurizing is not complete.
            ValueError: if the store was made with other settings, a Gram matrix is singular, or groups or positions do
                not fit the data. With ``rescore``: if the method cannot rescore, ``train`` is not known, or other data
                than the store's, or an exact score cannot be computed.
        """
        require_options(self.score, question, Question)
        require_ends(top_k, largest)
        trainer = trainer_of(trainer)
        self._require_trainer(trainer)
        if interval is not None:
            return self._with_interval(trainer, data, interval, top_k, largest, rescore, train, question)
        return self._score(trainer, data, top_k, largest, rescore, train, question)

    def _score(
        self,
        trainer: L.Trainer,
        data: Any,
        top_k: int | None,
        largest: bool | None,
        rescore: int | None,
        train: Any,
        question: Question,
        scorer: Scorer | None = None,
    ) -> Any:
        """See :meth:`score`. A scorer that is given may have done its work for other targets already."""
        positions = cast(Positions, train) if is_positions(train) else None
        given = _others_in(train, trainer)
        second = None if rescore is None else self._second_stage(trainer, top_k, rescore, given, positions)
        others = Others(given.loader, given.datamodule) if given is not None and second is None else None
        output = target_output(question.get("output"), self.output)
        if output is not None:
            _require_whole_model(trainer)
        loaders, pipeline = target_loaders(data, trainer, output), self._pipeline()
        features = TargetFeatures(pipeline, trainer)
        store, datamodule = features.store, datamodule_of(data)
        num_columns = store.num_examples if others is None else len(others)
        columns = train_columns(positions, question.get("train_groups"), num_columns)
        rows = target_rows(question, [num_examples(loader) for loader in loaders])
        scorer = scorer or self.make_scorer(store)
        if second is not None:
            second.require_possible(store, features.model.size, question)
        copy_model = partial(pipeline.copy_model, trainer)
        targets = [
            with_predictions(trainer, Examples(loader, "predict", trainer, datamodule), copy_model, output)
            for loader in loaders
        ]
        results: Sequence[Scores] = [
            score_targets(
                features,
                scorer,
                each.loader,
                datamodule,
                Kept(rescore or top_k, largest, sums, None if columns is None else columns.sums),
                output,
                others,
            )
            for each, sums in zip(targets, rows, strict=True)
        ]
        if columns is not None:
            results = [columns.named(result) for result in results]
        if second is not None:
            with without_gradients():
                passes = Passes(copy_model(), self.settings.seed, trainer, second.train, self.settings.engine)
                best = cast("Sequence[TopK | BothEnds]", results)
                results = second.best(passes, cast(TRAKScorer, scorer), targets, best, largest, rows, output)
        return results if holds_several(data) or len(results) > 1 else results[0]

    def _with_interval(
        self,
        trainer: L.Trainer,
        data: Any,
        interval: float,
        top_k: int | None,
        largest: bool | None,
        rescore: int | None,
        train: Any,
        question: Question,
    ) -> Interval:
        """See :meth:`score`: the scores of groups, and then those of all targets for the few columns that are kept.

        Raises:
            ValueError: if the columns are many, or there is no mean or sum over at least two targets.
        """
        few = top_k is not None or is_positions(train) or question.get("train_groups") is not None
        if not few or rescore is not None:
            raise ValueError(
                "interval needs the scores of every target for each column: leave rescore out, and keep the best"
                " columns with top_k=, name some by train=[...], or add them up with train_groups="
            )
        output, aggregate = target_output(question.get("output"), self.output), question.get("aggregate")
        loader, *more = target_loaders(data, trainer, output)
        if more:
            raise ValueError(f"interval takes one set of targets, got {1 + len(more)}; join them with a ConcatDataset")
        (rows,) = target_rows(question, [num_examples(loader)])
        require_interval(interval, rows)
        assert rows is not None
        scorer = self.make_scorer(TargetFeatures(self._pipeline(), trainer).store)  # fitted once, for both passes
        found = cast(Scores, self._score(trainer, data, top_k, largest, None, train, question, scorer))
        each: Any = {name: value for name, value in question.items() if name not in ("aggregate", "groups")}
        positions = None
        if top_k is not None and question.get("train_groups") is None:
            positions = torch.unique(all_indices(cast("TopK | BothEnds", found)))
            others = _others_in(train, trainer)
            train = positions if others is None else _some(others, positions)
        scores = self._score(trainer, data, None, None, None, train, each, scorer)
        return with_bounds(found, bounds(scores, rows, aggregate == "mean", interval), positions)

    def _second_stage(
        self, trainer: L.Trainer, top_k: int | None, rescore: int, train: Examples | None, positions: Positions | None
    ) -> SecondStage:
        """What scores candidates again; refuse what cannot be done before any work.

        Raises:
            ValueError: if it cannot be done.
        """
        exact = self._exact_scores()
        if top_k is None or positive("rescore", rescore) < top_k:
            raise ValueError(f"rescore needs a top_k of at most rescore={rescore}, got top_k={top_k}")
        if positions is not None:
            raise ValueError(
                "rescore chooses its candidates among all training examples: leave it out to score those in train=, or"
                " give the training data by train="
            )
        require_whole_parameters(trainer)
        train = train or Examples(self._training_data(None, "rescore"), "fit", trainer)
        return SecondStage(exact, train, top_k)


def _require_whole_model(trainer: L.Trainer) -> None:
    if shards_model(trainer):
        raise ValueError(
            "output= needs whole parameters, but ModelParallelStrategy splits them: use strategy='ddp' or a single"
            " device"
        )


def _others_in(train: Any, trainer: L.Trainer) -> Examples | None:
    """The examples that are given as data; None if they are given by position, or not at all."""
    if train is None or is_positions(train):
        return None
    return train if isinstance(train, Examples) else Examples(train, "fit", trainer)


def _some(examples: Examples, positions: Tensor) -> Examples:
    loader = examples.loader
    some = Subset(loader.dataset, positions.tolist())
    return examples.with_loader(like(loader, some, batch_size=batch_size_of(loader)))
