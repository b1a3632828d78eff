"""The LightningModule that makes and keeps features when ``trainer.predict`` runs it."""

from typing import Any, cast

from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_trak.features.engines import EngineName
from lightning_trak.features.extractor import FeatureExtractor
from lightning_trak.features.fsdp import ANOTHER_STRATEGY, ShardedFeatureExtractor, ShardedModelCopy, sharded_engine
from lightning_trak.features.model import ModelCopy
from lightning_trak.features.passes.extractor_module import ExtractorModule
from lightning_trak.features.passes.sinks import Sink
from lightning_trak.gradients import GradientEngine, coverage_report
from lightning_trak.gradients.base import EngineError
from lightning_trak.packages import is_a
from lightning_trak.projections.base import BoundProjection
from lightning_trak.running.data.ranges import IndexedBatch, RangeLoader, Stop
from lightning_trak.running.ranks import Ranks
from lightning_trak.storage.schemas import json_digest


class FeaturizeModule(ExtractorModule):
    """Featurizes batches of :class:`~lightning_trak.running.data.ranges.IndexedBatch`.

    The m-th dataloader is for the m-th checkpoint.

    Args:
        sink: takes the features.
        task: the name of the task on the progress bar.
        loader: the data.
        stop: ends the loaders when the engine must be changed.
        args: as for :class:`ExtractorModule`.
        kwargs: as for :class:`ExtractorModule`.

    Attributes:
        refuted: what the engine got wrong; None if nothing. After that no more features are made.
    """

    def __init__(self, sink: Sink, task: str, loader: DataLoader[Any], stop: Stop, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sink = sink
        self._task = task
        self._loader = loader
        self._stop = stop
        self.refuted: str | None = None
        self._alone: dict[int, Any] = {}  # audited examples, until the batch that they are part of

    def configure_model(self) -> None:
        """Let the model shard itself, if the Trainer's strategy shards models. At this point the processes run."""
        if isinstance(self.copied, ShardedModelCopy):
            self.copied.shard(self.device_mesh, self.trainer.strategy.root_device)

    def on_predict_start(self) -> None:
        """Check that all ranks of a sharded model will load the same ranges. Otherwise FSDP2 would mix up their data.

        Raises:
            ValueError: if the ranges differ.
        """
        if self.copied.sharded:
            loaders = cast(list[RangeLoader], self.trainer.predict_dataloaders)
            plan = [[(part.examples.start, part.examples.stop) for part in loader.ranges] for loader in loaders]
            Ranks.of(self.trainer).require_same(
                json_digest(plan),
                "other shards are missing in the store of a sharded model",
                "Put it on a disk that all ranks share, and let no other run write to it",
            )

    def _settle_engine(self) -> GradientEngine:
        """Use hooks for sharded models. All ranks set them up on the same examples."""
        if not self.copied.sharded:
            return super()._settle_engine()
        engine = sharded_engine(self.copied, self._first_two(self._loader), self._autocast)
        self.engine_name = "hooks"
        if self._train_loader is not None:
            report = coverage_report({}, self.copied.sizes)
            rank_zero_info(
                f"{self._store.user}: gradients by module hooks, because the model is sharded: {report} and agree with"
                " the gradients of FSDP2 on the first examples"
            )
            self._store.settle_engine("hooks")
        return engine

    def _new_extractor(self, model: ModelCopy, engine: GradientEngine, projection: BoundProjection) -> FeatureExtractor:
        if not model.sharded:
            return super()._new_extractor(model, engine, projection)
        dtype = self.settings.stored_dtype(projection.dim)
        return ShardedFeatureExtractor(model, engine, projection, dtype, self._layout)

    def on_predict_batch_start(self, batch: IndexedBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Show the task on the progress bar instead of "Predicting DataLoader 0"."""
        bar, text = self.trainer.progress_bar_callback, f"{self._task}, checkpoint {dataloader_idx + 1}"
        if batch_idx == 0 and is_a(bar, TQDMProgressBar):
            bar.predict_progress_bar.set_description(text)
        elif batch_idx == 0 and is_a(bar, RichProgressBar) and bar.predict_progress_bar_id is not None:
            assert bar.progress is not None
            bar.progress.update(bar.predict_progress_bar_id, description=text)

    def predict_step(self, batch: IndexedBatch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Give the batch's features to the sink. Return its positions: Lightning warns about None."""
        if self.refuted is None:
            try:
                self._featurize(batch, dataloader_idx)
            except EngineError as error:
                self._give_up(error)
        return batch.positions

    def _featurize(self, batch: IndexedBatch, checkpoint: int) -> None:
        if self._layout is None:
            self.learn_batches(self._loader)
        self.enter(checkpoint)
        if batch.alone:
            if isinstance(self._extractor, ShardedFeatureExtractor):
                alone: Any = self._extractor.one(batch.batch, int(batch.positions[0]))
            else:
                alone = batch.batch
            if batch.number is not None:
                self._alone[int(batch.positions[0])] = alone
            return
        found = {row: self._alone.pop(i) for row, i in enumerate(batch.positions.tolist()) if i in self._alone}
        if not self.repeatable:
            found = dict.fromkeys(found)  # loaded again, an example is another one: the audit takes it from its batch
        rows = self.featurize(batch.batch, batch.positions, found)
        if batch.number is not None and not self._sink.add(
            checkpoint, batch.number, batch.positions, rows, cast(EngineName, self.engine_name)
        ):
            raise EngineError("another process has found that this engine gets a gradient wrong")

    def _give_up(self, error: EngineError) -> None:
        """Stop, and leave the rest to the next engine.

        Raises:
            ValueError: if the user has chosen the engine, or the model is sharded.
        """
        used = self.engine_name
        if self.settings.engine != "auto" or self.copied.sharded:
            advice = "engine='auto', which chooses another engine, or engine='loop'"
            raise ValueError(
                f"engine={used!r} cannot differentiate this model correctly: {error}. Its shard was not written;"
                f" use {ANOTHER_STRATEGY if self.copied.sharded else advice}"
            ) from error
        self.refuted = str(error)
        self._stop.requested = True
