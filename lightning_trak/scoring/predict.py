"""The LightningModule that scores batches as a loader yields them."""

import random
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_trak.compatibility import drawn_batches
from lightning_trak.features.finiteness import require_finite
from lightning_trak.features.passes.extractor_module import AUDITED_TOGETHER, ExtractorModule
from lightning_trak.features.precision import precision_of
from lightning_trak.gradients.base import EngineError
from lightning_trak.gradients.batch import infer_batch_size
from lightning_trak.gradients.separable import separable
from lightning_trak.running.data.loading import LEAVES_OUT, batch_size_of
from lightning_trak.running.data.singles import Singles, is_one_by_one
from lightning_trak.running.ranks import Ranks
from lightning_trak.running.strategies import shards_model
from lightning_trak.scoring.base import Scorer
from lightning_trak.scoring.topk import Scores


class ScoreModule(ExtractorModule):
    """Scores the batches of any loader against every stored example, one batch at a time.

    ``trainer.predict`` returns for each batch a Tensor ``(batch, num_train)``, or a
    :class:`~lightning_trak.scoring.topk.BothEnds` of ``(batch, top_k)`` each. The weights of all checkpoints stay in
    host memory; the method's ``score`` loads each only once and suits many targets better.
    """

    def __init__(self, scorer: Scorer, top_k: int | None, largest: bool | None, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._scorer = scorer
        self._top_k = top_k
        self._largest = largest
        self._learned: int | None = None  # the dataloader whose batches are known
        self._one_by_one = False  # whether each of them is an example that cannot be joined with others

    def setup(self, stage: str) -> None:
        """Get the scorer ready; every rank takes part. What an earlier run has on another device is dropped."""
        if shards_model(self.trainer):
            raise ValueError(
                "scorer() scores what Lightning deals out, which need not be equally many batches on each rank, as a"
                " sharded model needs: use score()"
            )
        super().setup(stage)
        precision = precision_of(self.trainer, self.copied.output)
        if self._store.precision not in (None, precision):
            raise ValueError(
                f'store "{self._store.directory}" was made with precision {self._store.precision}, this Trainer has'
                f" precision {precision}; use another directory or the same precision"
            )
        self._learned = self._engine = None
        self._bound.clear()
        self._scorer.fit(self.trainer.strategy.root_device, Ranks.of(self.trainer))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Scores:
        """Scores of a batch of targets.

        Raises:
            ValueError: if the engine gets a gradient wrong.
        """
        if dataloader_idx != self._learned:
            self._learn(dataloader_idx)
        if self._one_by_one:
            batch = Singles([batch])
        size = 1 if isinstance(batch, Singles) else infer_batch_size(batch, self._layout)
        self._require_all(size, dataloader_idx, batch_idx)
        positions, audited = torch.arange(size), self._audited(size, dataloader_idx, batch_idx)
        directions = []
        for checkpoint in range(self._store.num_checkpoints):
            self.enter(checkpoint)
            try:
                rows = self.featurize(batch, positions, dict.fromkeys(audited))
            except EngineError as error:
                raise ValueError(
                    f"engine={self.engine_name!r} cannot differentiate this model correctly: {error}. Use score(),"
                    " which takes another engine, or engine='loop'"
                ) from error
            require_finite(rows, positions, self.copied.place)
            directions.append(self._scorer.directions(checkpoint, rows))
        return self._scorer.score(directions, top_k=self._top_k, largest=self._largest)

    def _learn(self, number: int) -> None:
        """Find out how the Trainer's loader puts examples together, if it has a dataset to try it with."""
        self._learned = number
        loader = self._loader(number)
        if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
            apart = separable(loader)
            self._one_by_one = is_one_by_one(apart)
            if self._one_by_one and batch_size_of(loader) != 1:
                raise ValueError(
                    "the collate function joins examples so that they cannot be taken apart again, as it joins graphs:"
                    " give scorer() batches of one example, or use score(), which loads them one by one"
                )
            self.learn_batches(apart)
        else:
            self._one_by_one = False
            self.forget_batches()

    def _require_all(self, size: int, dataloader: int, number: int) -> None:
        """Check that a batch holds all examples that were drawn for it, as far as Lightning has noted them.

        Raises:
            ValueError: if it holds others. The rows of scores would not belong to the examples of the dataset.
        """
        drawn = drawn_batches(self._loader(dataloader))
        if drawn is not None and len(drawn[number]) != size:
            raise ValueError(
                f"batch {number} has {size} examples, and {len(drawn[number])} were drawn for it: {LEAVES_OUT}"
            )

    def _loader(self, number: int) -> Any:
        loaders = self.trainer.predict_dataloaders
        return loaders[number] if isinstance(loaders, (list, tuple)) else loaders

    def _audited(self, size: int, dataloader: int, number: int) -> list[int]:
        """Which rows of a batch to audit: as many of each 1024 targets as the settings say, in one batch of these."""
        if number % max(1, AUDITED_TOGETHER // size):
            return []
        draw = random.Random(f"{self.settings.seed}/{dataloader}/{number}/audit")
        return sorted(draw.sample(range(size), min(self.settings.audit, size)))
