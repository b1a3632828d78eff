"""The LightningModules that ``trainer.predict`` runs: one featurizes, one scores batches as they come."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_trak.data import IndexedBatch, load, sample_batches, transfer_hook
from lightning_trak.distributed import Ranks
from lightning_trak.features import EngineName, FeatureExtractor, require_finite
from lightning_trak.gradients.batch import infer_batch_size
from lightning_trak.scorers.base import Scorer, Scores
from lightning_trak.store import Features, FeatureStore
from lightning_trak.transfer import HostCopy, Upload


class Sink(Protocol):
    """Where features go, apart from how they are made."""

    def add(self, checkpoint: int, number: int, positions: Tensor, rows: Features) -> None:
        """Take the rows of the examples at ``positions``, which are part of range ``number``."""


class ShardWriter:
    """Collects rows until a shard is whole, then checks it and writes it to the store while the next one is computed.

    Use it as a context manager, which waits for the last shard. An error in one is raised before the one after the next
    is begun.

    Args:
        store: where shards go.
        places: what to call the checkpoints in errors.
    """

    def __init__(self, store: FeatureStore, places: Sequence[str]) -> None:
        self.store = store
        self._places = places
        self._copies: list[HostCopy] = []
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._wait()
        finally:
            self._thread.shutdown()

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def add(self, checkpoint: int, number: int, positions: Tensor, rows: Features) -> None:  # noqa: D102
        shard = self.store.shard(number)
        if int(positions[0]) == shard.start:
            self._copies = []
        self._copies.append(HostCopy.start(rows))
        if int(positions[-1]) == shard[-1]:
            self._wait()
            self._writing = self._thread.submit(self._write, checkpoint, number, self._copies)

    def _write(self, checkpoint: int, number: int, copies: list[HostCopy]) -> None:
        parts = [copy.wait() for copy in copies]
        rows = Features(*(torch.cat(column) for column in zip(*parts, strict=True)))
        shard = self.store.shard(number)
        require_finite(rows, torch.arange(shard.start, shard.stop), self._places[checkpoint])
        self.store.write(checkpoint, number, rows)


class FeatureBuffer:
    """Keeps rows in memory.

    Args:
        places: what to call the checkpoints in errors.
    """

    def __init__(self, places: Sequence[str]) -> None:
        self._places = places
        self._copies: list[list[tuple[Tensor, HostCopy]]] = [[] for _ in places]

    def add(self, checkpoint: int, number: int, positions: Tensor, rows: Features) -> None:  # noqa: ARG002, D102
        self._copies[checkpoint].append((positions, HostCopy.start(rows)))

    def take(self, checkpoint: int) -> list[tuple[Tensor, Features]]:
        """Positions and rows that came for a checkpoint; they are not kept any longer.

        Raises:
            ValueError: if one of them is not finite.
        """
        copies, self._copies[checkpoint] = self._copies[checkpoint], []
        found = []
        for positions, copy in copies:
            rows = Features(*copy.wait())
            require_finite(rows, positions, self._places[checkpoint])
            found.append((positions, rows))
        return found


class PredictModule(L.LightningModule):
    """Holds our copy of the user's module, so that Lightning moves it to the device, and uses the user's batch hooks.

    Args:
        model: the copy.
        datamodule: where the data came from, if it has batch transfer hooks of its own.
    """

    def __init__(self, model: nn.Module, datamodule: L.LightningDataModule | None = None) -> None:
        super().__init__()
        # A rank without work runs no hook, and there is no collective that the others could wait in.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self.model = model
        self._datamodule = datamodule
        self._upload: Upload | None = None

    def release(self) -> None:
        """Let go of the model, since the Trainer keeps this module until its next call."""
        del self.model

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The user's hook, on the user's batch."""
        return self._hook("on_before_batch_transfer", batch, dataloader_idx)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """The user's hook, on the user's batch, beside what the device is computing."""
        if self._upload is None:
            self._upload = Upload(device)
        return self._upload(lambda: self._hook("transfer_batch_to_device", batch, device, dataloader_idx))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The user's hook, on the user's batch."""
        return self._hook("on_after_batch_transfer", batch, dataloader_idx)

    def _hook(self, name: str, batch: Any, *args: Any) -> Any:
        hook = transfer_hook(name, self.model, self._datamodule)
        if isinstance(batch, IndexedBatch):
            return batch._replace(batch=hook(batch.batch, *args))
        return hook(batch, *args)


class ExtractorModule(PredictModule):
    """Makes features.

    Args:
        extractor: makes the features, on a copy of the user's module.
        store: holds what the model output remembers of the training data at each checkpoint.
        datamodule: where the data came from, if it has batch transfer hooks of its own.
        train_loader: training data to remember when the store holds nothing yet.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        store: FeatureStore,
        datamodule: L.LightningDataModule | None = None,
        train_loader: DataLoader[Any] | None = None,
    ) -> None:
        super().__init__(extractor.module, datamodule)
        self.extractor = extractor
        self._store = store
        self._train_loader = train_loader

    def release(self) -> None:
        """Let go of model and features."""
        super().release()
        del self.extractor

    def enter(self, checkpoint: int) -> None:
        """Make the extractor ready for a checkpoint."""
        if self.extractor.current == checkpoint:
            return
        self.extractor.to_checkpoint(checkpoint, self.device)
        if self.extractor.output.context_size:
            self._enter_context(checkpoint)
        if self.extractor.undecided:
            self._settle_engine()
        if self.extractor.projection.sample_size:
            self._enter_projection(checkpoint)

    def _enter_context(self, checkpoint: int) -> None:
        with torch.inference_mode(False):  # autograd saves the context
            context = self._store.read_extra(checkpoint, "context", self._store.key)
            if context is None:
                batches = self._sample(checkpoint, "context", self.extractor.output.context_size)
                context = self.extractor.make_context(batch for batch, _ in batches)
                self._store.write_extra(checkpoint, "context", context, self._store.key)
            self.extractor.output.set_context({name: tensor.to(self.device) for name, tensor in context.items()})

    def _enter_projection(self, checkpoint: int) -> None:
        fitted = self._store.read_extra(checkpoint, "projection", self._store.key)
        if fitted is None:
            batches = self._sample(checkpoint, "projection", self.extractor.projection.sample_size)
            fitted = self.extractor.fit_projection(batches)
            self._store.write_extra(checkpoint, "projection", fitted, self._store.key)
        self.extractor.set_projection_fit(fitted)

    def _settle_engine(self) -> None:
        """Choose by the first two training examples, once for the store: no run depends on what it happens to see."""
        engine = self._store.settle_engine()
        if engine is None and self._train_loader is not None:
            positions = list(range(min(2, self._store.num_examples)))
            (batch,) = self._batches([positions])
            choice, reason = self.extractor.choose_engine(batch, len(positions))
            how = {"hooks": "module hooks", "functional": "vmap"}[choice]
            rank_zero_info(f"TRAK: gradients by {how}, chosen by engine='auto': {reason}")
            engine = self._store.settle_engine(choice)
        if engine is not None:
            self.extractor.use_engine(cast(EngineName, engine))

    def _sample(self, checkpoint: int, purpose: str, count: int) -> Iterator[tuple[Any, int]]:
        """A uniform sample of the training data, without replacement, another one at each checkpoint."""
        assert self._train_loader is not None, "the store holds the context once featurizing is complete"
        positions = sample_batches(self._train_loader, count, f"{self.extractor.seed}/{checkpoint}/{purpose}")
        yield from zip(self._batches(positions), map(len, positions), strict=True)

    def _batches(self, positions: list[list[int]]) -> Iterator[Any]:
        """Training examples at some positions, a batch for each list, on the device."""
        for batch in load(cast(DataLoader[Any], self._train_loader), positions):
            batch = self.on_before_batch_transfer(batch, 0)
            batch = self.transfer_batch_to_device(batch, self.device, 0)
            yield self.on_after_batch_transfer(batch, 0)


class FeaturizeModule(ExtractorModule):
    """Featurizes :class:`~lightning_trak.data.IndexedBatch`; the m-th dataloader is for the m-th checkpoint."""

    def __init__(self, sink: Sink, task: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sink = sink
        self._task = task

    def on_predict_batch_start(self, batch: IndexedBatch, batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ARG002
        """Have the progress bar say what it shows, rather than "Predicting DataLoader 0"."""
        bar, text = self.trainer.progress_bar_callback, f"{self._task}, checkpoint {dataloader_idx + 1}"
        if batch_idx == 0 and isinstance(bar, TQDMProgressBar):
            bar.predict_progress_bar.set_description(text)
        elif batch_idx == 0 and isinstance(bar, RichProgressBar) and bar.predict_progress_bar_id is not None:
            assert bar.progress is not None
            bar.progress.update(bar.predict_progress_bar_id, description=text)

    def predict_step(self, batch: IndexedBatch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:  # noqa: ARG002
        """Hand the batch's features to the sink; returns its positions, since Lightning warns of None."""
        self.enter(dataloader_idx)
        rows = self.extractor(batch.batch, batch.positions)
        self._sink.add(dataloader_idx, batch.number, batch.positions, rows)
        return batch.positions


class ScoreModule(ExtractorModule):
    """Scores the batches of any loader against every stored example, one batch at a time.

    ``trainer.predict`` returns for each batch a Tensor ``(batch, num_train)``, or a
    :class:`~lightning_trak.scorers.topk.TopK` of ``(batch, top_k)`` each. The weights of all checkpoints stay in host
    memory; the method's ``score`` loads each only once and suits many targets better.
    """

    def __init__(self, scorer: Scorer, top_k: int | None, largest: bool, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._scorer = scorer
        self._top_k = top_k
        self._largest = largest

    def setup(self, stage: str) -> None:  # noqa: ARG002
        """Get the scorer ready; every rank takes part. What an earlier run has on another device is dropped."""
        self.extractor.reset()
        self._scorer.fit(self.trainer.strategy.root_device, Ranks.of(self.trainer))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Scores:  # noqa: ARG002
        """Scores of a batch of targets."""
        positions = torch.arange(infer_batch_size(batch))
        directions = []
        for checkpoint in range(self._store.num_checkpoints):
            self.enter(checkpoint)
            rows = self.extractor(batch, positions)
            require_finite(rows, positions, self.extractor.places[checkpoint])
            directions.append(self._scorer.directions(checkpoint, rows))
        return self._scorer.score(directions, top_k=self._top_k, largest=self._largest)
