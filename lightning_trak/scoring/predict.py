"""The LightningModule that scores batches as a loader yields them."""

import random
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_trak.features.extractor_module import AUDITED_TOGETHER, ExtractorModule
from lightning_trak.features.finiteness import require_finite
from lightning_trak.features.precision import precision_of
from lightning_trak.gradients.base import EngineError
from lightning_trak.gradients.batch import infer_batch_size
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
        size = infer_batch_size(batch, self._layout)
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
        loaders = self.trainer.predict_dataloaders
        loader = loaders[number] if isinstance(loaders, (list, tuple)) else loaders
        if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
            self.learn_batches(loader)
        else:
            self.forget_batches()

    def _audited(self, size: int, dataloader: int, number: int) -> list[int]:
        """Which rows of a batch to audit: as many of each 1024 targets as the settings say, in one batch of these."""
        if number % max(1, AUDITED_TOGETHER // size):
            return []
        draw = random.Random(f"{self.settings.seed}/{dataloader}/{number}/audit")
        return sorted(draw.sample(range(size), min(self.settings.audit, size)))
