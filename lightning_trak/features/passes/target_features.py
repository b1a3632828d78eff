"""Makes features of targets, in memory."""

from collections.abc import Iterable, Iterator
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from lightning_trak.features.engines import EngineName
from lightning_trak.features.finiteness import explaining
from lightning_trak.features.model import ModelCopy
from lightning_trak.features.passes.extractor_module import AUDITED_TOGETHER
from lightning_trak.features.passes.featurize_module import FeaturizeModule
from lightning_trak.features.passes.pipeline import FeaturePipeline
from lightning_trak.features.passes.refuted import next_engine, refuted_engine
from lightning_trak.features.passes.sinks import FeatureBuffer
from lightning_trak.features.rows import Features, in_order
from lightning_trak.gradients.separable import separable
from lightning_trak.outputs import ModelOutput
from lightning_trak.running.chunks import chunked
from lightning_trak.running.data.loading import batch_size_of
from lightning_trak.running.data.ranges import Range, Stop, batch_ranges, share_out
from lightning_trak.running.ranks import Ranks
from lightning_trak.running.trainers import predict_over


class TargetFeatures:
    """Makes features of targets, or of other examples, with ``trainer.predict``: like those of a complete store.

    Args:
        pipeline: has made the features of the store.
        trainer: runs the work.

    Attributes:
        trainer: runs the work.
        settings: how features are made.
        model: a copy of the model.
        store: the store.

    Raises:
        FileNotFoundError: if there is no store yet.
        RuntimeError: if featurizing is not complete.
        ValueError: if the store was made with other settings, or the Trainer spawns processes or splits the model in a
            way that cannot be differentiated.
    """

    def __init__(self, pipeline: FeaturePipeline, trainer: L.Trainer) -> None:
        self.trainer = trainer
        self.settings = pipeline.settings
        self.model = pipeline.copy_model(trainer)
        self.store = pipeline.open_complete(self.model, trainer)
        self._user = pipeline.user

    def make(
        self,
        loader: DataLoader[Any],
        blocks: Iterable[range],
        datamodule: L.LightningDataModule | None,
        output: ModelOutput | None = None,
        of: str = "",
    ) -> Iterator[Iterator[Features]]:
        """The features of some examples, computed one block after another.

        Args:
            loader: the loader of the examples.
            blocks: the positions of the examples in each block.
            datamodule: the data module that gave the loader, if there is one. It may have batch transfer hooks of its
                own.
            output: of the examples, if it is another one than that of the training examples.
            of: for errors, what follows the number of an example.

        Yields:
            On every rank, the features of a block at each checkpoint. Rows are in the order of the dataset.
        """
        engine: EngineName | None = None
        trainer, model, loaded = self.trainer, self.model, separable(loader)
        for examples in blocks:
            while True:
                buffer, stop = FeatureBuffer([f"{of} {place}".strip() for place in model.places]), Stop()
                module = FeaturizeModule.of(trainer)(
                    buffer, "Scoring", loaded, stop, model, self.settings, self.store, datamodule, None, engine, output
                )
                jobs = self._jobs(examples, batch_size_of(loader))
                predict_over(trainer, module, share_out(loaded, jobs, trainer, model.sharded, stop))
                ranks = Ranks.of(trainer)  # its processes run now
                wrong = refuted_engine(module, ranks)
                if wrong is None:
                    break
                engine = next_engine(*wrong, self._user, "features of targets")
                ranks.barrier()
            own = model if output is None else model.with_output(output)
            yield _gathered(buffer, examples, loader, own, ranks)

    def _jobs(self, examples: range, size: int) -> list[list[Range]]:
        """The ranges of some examples at each checkpoint, each one batch."""
        parts, draw = chunked(examples, AUDITED_TOGETHER), self.settings.draw
        return [
            batch_ranges(examples, size, {i for part in parts for i in draw(checkpoint, part)})
            for checkpoint in range(self.store.num_checkpoints)
        ]


def _gathered(
    buffer: FeatureBuffer, examples: range, loader: DataLoader[Any], model: ModelCopy, ranks: Ranks
) -> Iterator[Features]:
    """The features from all ranks, one checkpoint after another."""
    for checkpoint in range(len(model.places)):
        with explaining(model, loader):
            own = buffer.take(checkpoint)
        yield in_order([part for found in ranks.gather(own) for part in found], examples)
