"""What methods over stored gradient features share: a model, its checkpoints and a store in, attributions out."""

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict, cast

import lightning as L
import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_trak.checkpoints.copies import state_digest, uncompiled
from lightning_trak.checkpoints.reading import CheckpointSource, resolve_checkpoints
from lightning_trak.checks import positive
from lightning_trak.features.extractor import ENGINES, EngineName, FeatureExtractor
from lightning_trak.features.finiteness import NotFiniteError
from lightning_trak.features.fsdp import ShardedFeatureExtractor
from lightning_trak.features.precision import precision_of
from lightning_trak.features.predict import AUDITED_TOGETHER, FeaturizeModule
from lightning_trak.features.sinks import FeatureBuffer, ShardWriter
from lightning_trak.features.store import Features, FeatureStore
from lightning_trak.fingerprints import module_fingerprint
from lightning_trak.gradients import ParameterSelection
from lightning_trak.methods.base import Method
from lightning_trak.outputs import ModelOutput
from lightning_trak.outputs.mixin import declared_output
from lightning_trak.projections import Projection, SparseProjection
from lightning_trak.running.data import (
    Data,
    Range,
    Stop,
    as_loaders,
    batch_ranges,
    batch_size_of,
    fingerprint,
    holds_several,
    share_out,
    single_loader,
)
from lightning_trak.running.ranks import Ranks
from lightning_trak.running.stopping import Interruption
from lightning_trak.running.trainers import predict_over, refuse_spawning, shards_model
from lightning_trak.scoring.base import Scorer, Scores
from lightning_trak.scoring.predict import ScoreModule
from lightning_trak.scoring.topk import TopK
from lightning_trak.storage.files import tensor_digest
from lightning_trak.storage.paths import local_directory
from lightning_trak.texts import counted

Checkpoints = Sequence[CheckpointSource] | CheckpointSource  # in this order a command line can tell them apart

# Targets are scored in blocks whose features take this much memory; a few copies of them are made on the way.
TARGET_BYTES = 1 << 28


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

    Methods that differ in how they score can share a store: what it holds depends on none of that. The model, its mode,
    weights, ``.grad`` and buffers are never touched: the work is done on a copy.

    Args:
        model: the trained model; a LightningModule with :class:`~lightning_trak.AttributionMixin`, or any module when
            ``output`` is given.
        checkpoints: a snapshot directory, or a list of snapshot directories, state dicts, safetensors files and
            Lightning ``.ckpt`` paths.
        store: directory of the features, on a disk that all ranks see.
        output: the scalar output to attribute; default: the model's ``configure_model_output()``.
        projection: what compresses gradients; default: :class:`~lightning_trak.projections.SparseProjection`.
        parameters: which parameters to differentiate, by name pattern; default: all that require gradients.
        engine: how gradients are computed: ``"auto"``, ``"functional"``, ``"hooks"`` or ``"loop"``, see
            :class:`~lightning_trak.features.extractor.FeatureExtractor`.
        seed: seed of the projection.
        dtype: dtype of the stored features.
        weights_only: ``False`` lets ``.ckpt`` and ``.pt`` files run code when they are read; for files you trust only.
        audit: how many examples of each shard, and of each thousand targets, are differentiated again, one at a time by
            plain autograd, and must have the features that the engine gave them. 0 checks none.
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
        require_one_of("engine", engine, ("auto", "functional", "hooks", "loop"))
        require_one_of("dtype", dtype, (torch.float64, torch.float32, torch.bfloat16, torch.float16))
        self.model = uncompiled(model)
        self.output = declared_output(self.model, output)
        self.checkpoints = resolve_checkpoints(checkpoints, weights_only=weights_only)
        self.store = local_directory(store, "store")
        self.projection = projection if projection is not None else SparseProjection()
        self.parameters = parameters
        self.engine: EngineName = engine
        self.seed = seed
        self.dtype = dtype
        if not isinstance(audit, int) or audit < 0:
            raise ValueError(f"audit must be a number of examples, 0 for none, got {audit!r}")
        self.audit = audit

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
        refuse_spawning(trainer)
        sharded = shards_model(trainer)
        loader = single_loader(data, "fit", trainer)
        extractor = self._extractor(sharded=sharded)
        num_examples = len(cast(Any, loader.dataset))
        precision = precision_of(trainer, self.output)
        identity = self._identity(extractor) | {"precision": precision, "data": fingerprint(loader)}
        self._require_enough(num_examples, self._dim(extractor))
        default = _default_shard_size(num_examples, loader)
        shard_size = default if shard_size is None else positive("shard_size", shard_size)
        store = FeatureStore(self.store, identity, num_examples, shard_size, user=type(self).__name__)
        self._require_engine(store, sharded)
        needed = {"context": extractor.output.context_size, "projection": extractor.projection.sample_size}
        extras = [name for name, size in needed.items() if size]
        selected = sum(extractor.sizes.values())
        total = sum(parameter.numel() for parameter in self.model.parameters())
        rank_zero_info(
            f"{type(self).__name__}: {counted(num_examples, 'example')} at"
            f" {counted(store.num_checkpoints, 'checkpoint')}, gradients of {selected} of"
            f" {counted(total, 'parameter')}, {type(self.projection).__name__} to"
            f" {counted(self._dim(extractor), 'feature')}: {sum(map(len, _missing(store, extras)))} of"
            f" {counted(store.num_checkpoints * store.num_shards, 'shard')} to do"
        )
        datamodule = data if isinstance(data, L.LightningDataModule) else None
        while any(missing := _missing(store, extras)):
            jobs = [
                [Range(number, store.shard(number), extractor.draw(c, store.shard(number))) for number in numbers]
                for c, numbers in enumerate(missing)
            ]
            stop = Stop()
            interruption = Interruption(stop)
            with _explaining(extractor, loader), ShardWriter(store, extractor.places) as writer:
                module = FeaturizeModule(writer, "Featurizing", loader, stop, extractor, store, datamodule, loader)
                predict_over(trainer, module, share_out(loader, jobs, trainer, sharded, stop), interruption)
            interruption.raise_if_received(Ranks.of(trainer), lambda: _done(store))
            if not self._refuted(module, extractor, trainer, store):
                break
        store.require_complete()

    def _refuted(
        self, module: FeaturizeModule, extractor: FeatureExtractor, trainer: L.Trainer, store: FeatureStore | None
    ) -> bool:
        """Whether a rank has found the engine to be wrong; if so, the next one is used, in a given store too."""
        ranks = Ranks.of(trainer)
        reasons = [reason for reason in ranks.gather(module.refuted) if reason is not None]
        if not reasons:
            return False
        used = extractor.used
        following = ENGINES[ENGINES.index(used) + 1]
        if store is not None and used not in store.refuted_engines():
            store.refute_engine(used, reasons[0], following)
        what = "features of targets" if store is None else "all features of the store"
        rank_zero_warn(
            f"{type(self).__name__}: engine {used!r} cannot differentiate this model rightly, so {what} are computed"
            f" again with engine {following!r}: {reasons[0]}"
        )
        ranks.barrier()
        extractor.use_engine(cast(EngineName, store.settle_engine()) if store is not None else following)
        return True

    def score(
        self, trainer: L.Trainer, data: Data | Sequence[DataLoader[Any]], top_k: int | None = None, largest: bool = True
    ) -> Any:
        """Score every target against every training example.

        A positive score says that training on the example helps the target, as each method has it.

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
        loaders, extractor = as_loaders(data, "predict", trainer), self._extractor(sharded=shards_model(trainer))
        store = self._ready_store(extractor, trainer)
        scorer = self.make_scorer(store)
        datamodule = data if isinstance(data, L.LightningDataModule) else None
        results = []
        for loader in loaders:
            parts: list[Scores] = []
            for examples in self._target_blocks(loader, store, extractor, top_k):
                features = self._target_features(trainer, loader, examples, extractor, store, datamodule)
                scorer.fit(trainer.strategy.root_device, Ranks.of(trainer))
                directions = [scorer.directions(checkpoint, rows) for checkpoint, rows in enumerate(features)]
                parts.append(scorer.score(directions, top_k, largest, Ranks.of(trainer)))
            results.append(_concatenate(parts))
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
        loader, extractor = single_loader(data, "predict", trainer), self._extractor(sharded=shards_model(trainer))
        store = self._ready_store(extractor, trainer)
        examples = range(len(cast(Any, loader.dataset)))
        datamodule = data if isinstance(data, L.LightningDataModule) else None
        return list(self._target_features(trainer, loader, examples, extractor, store, datamodule))

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
        scorer, ranks = self.make_scorer(self._existing_store(self._extractor(), trainer)), Ranks.of(trainer)
        scorer.fit(trainer.strategy.root_device, ranks)
        return scorer.self_scores(ranks)

    def scorer(self, top_k: int | None = None, largest: bool = True) -> ScoreModule:
        """A module for ``trainer.predict(method.scorer(), loader)``: scores for each batch as the loader yields it.

        Args:
            top_k: keep only this many training examples for each target.
            largest: whether ``top_k`` keeps the highest scores or the lowest.
        """
        extractor = self._extractor(keep=True)
        store = self._existing_store(extractor)
        store.require_complete()
        return ScoreModule(self.make_scorer(store), top_k, largest, extractor, store)

    def _target_features(
        self,
        trainer: L.Trainer,
        loader: DataLoader[Any],
        examples: range,
        extractor: FeatureExtractor,
        store: FeatureStore,
        datamodule: L.LightningDataModule | None,
    ) -> Iterator[Features]:
        """The features of some targets, computed now and given checkpoint by checkpoint, on every rank."""
        chunks = [examples[start : start + AUDITED_TOGETHER] for start in range(0, len(examples), AUDITED_TOGETHER)]
        jobs = [
            batch_ranges(examples, batch_size_of(loader), {i for part in chunks for i in extractor.draw(c, part)})
            for c in range(store.num_checkpoints)
        ]
        while True:
            buffer, stop = FeatureBuffer(extractor.places), Stop()
            module = FeaturizeModule(buffer, "Scoring", loader, stop, extractor, store, datamodule)
            predict_over(trainer, module, share_out(loader, jobs, trainer, extractor.sharded, stop))
            if not self._refuted(module, extractor, trainer, None):
                break
        ranks = Ranks.of(trainer)

        def taken(checkpoint: int) -> list[tuple[Tensor, Features]]:
            with _explaining(extractor, loader):
                return buffer.take(checkpoint)

        return (
            _in_order([part for found in ranks.gather(taken(checkpoint)) for part in found], examples)
            for checkpoint in range(store.num_checkpoints)
        )

    def _target_blocks(
        self, loader: DataLoader[Any], store: FeatureStore, extractor: FeatureExtractor, top_k: int | None
    ) -> Iterator[range]:
        """Targets in blocks that fit in memory: their features at all checkpoints, and their scores for a shard."""
        total, batch = len(cast(Any, loader.dataset)), batch_size_of(loader)
        numbers = max(self._dim(extractor) * store.num_checkpoints, store.shard_size + (top_k or 0))
        step = batch * max(1, TARGET_BYTES // (batch * numbers * max(4, self.dtype.itemsize)))
        return (range(start, min(start + step, total)) for start in range(0, total, step))

    def _require_engine(self, store: FeatureStore, sharded: bool) -> None:
        engine, refuted = store.settle_engine(), store.refuted_engines()
        if self.engine in refuted:
            raise ValueError(
                f'engine={self.engine!r} was found to get a gradient wrong when store "{store.directory}" was made:'
                f" {refuted[self.engine]}. Use engine='auto', which goes on with {engine!r}"
            )
        if sharded and self.engine == "auto" and engine not in (None, "hooks"):
            raise ValueError(
                f'store "{store.directory}" was begun with engine {engine!r}, which needs whole parameters, and'
                " ModelParallelStrategy splits them: use strategy='ddp' or a single device, or another directory"
            )

    def _extractor(self, keep: bool = False, sharded: bool = False) -> FeatureExtractor:
        kind = ShardedFeatureExtractor if sharded else FeatureExtractor
        return kind(
            self.model,
            self.output,
            self.checkpoints,
            [digest for digest, _ in self._contents],
            self.projection,
            parameters=self.parameters,
            engine=self.engine,
            seed=self.seed,
            dtype=self.dtype,
            keep=keep,
            audit=self.audit,
        )

    @cached_property
    def _contents(self) -> list[tuple[str, frozenset[str]]]:
        """The digest of each checkpoint, and the names in it."""
        loaded = (checkpoint.load() for checkpoint in self.checkpoints)
        return [(tensor_digest(weights), frozenset(weights)) for weights in loaded]

    def _dim(self, extractor: FeatureExtractor) -> int:
        return self.projection.bind(extractor.shapes, seed=self.seed, checkpoint=0, device=torch.device("cpu")).dim

    def _identity(self, extractor: FeatureExtractor) -> dict[str, Any]:
        shapes = {name: list(parameter.shape) for name, parameter in extractor.module.named_parameters()}
        return {
            "seed": self.seed,
            "dtype": str(self.dtype).removeprefix("torch."),
            "projection": self.projection.fingerprint(),
            "output": self.output.fingerprint(),
            "model": module_fingerprint(extractor.module, used_by=self.output),
            "parameters": [[name, shapes[raw]] for name, raw in extractor.names.items()],
            "checkpoints": [
                hashlib.sha256(f"{digest} {state_digest(extractor.module, names)}".encode()).hexdigest()
                for digest, names in self._contents
            ],
        }

    def _ready_store(self, extractor: FeatureExtractor, trainer: L.Trainer) -> FeatureStore:
        refuse_spawning(trainer)
        store = self._existing_store(extractor, trainer)
        store.require_complete()
        self._require_engine(store, extractor.sharded)
        return store

    def _existing_store(self, extractor: FeatureExtractor, trainer: L.Trainer | None = None) -> FeatureStore:
        num_examples = FeatureStore.read_manifest(self.store)["num_examples"]
        identity = self._identity(extractor)
        if trainer is not None:
            identity["precision"] = precision_of(trainer, self.output)
        return FeatureStore(self.store, identity, num_examples, read_only=True, user=type(self).__name__)


def _done(store: FeatureStore) -> str:
    missing = sum(len(store.missing(checkpoint)) for checkpoint in range(store.num_checkpoints))
    total = store.num_checkpoints * store.num_shards
    return f"the store has {total - missing} of {total} shards"


def require_one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Check an argument that has few values."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


@contextmanager
def _explaining(extractor: FeatureExtractor, loader: DataLoader[Any]) -> Iterator[None]:
    """Have the output say why the feature of an example is not finite."""
    try:
        yield
    except NotFiniteError as error:
        if extractor.sharded:
            raise
        raise error.explained(extractor, loader) from error


def _missing(store: FeatureStore, extras: Sequence[str]) -> list[list[int]]:
    """The shards to do at each checkpoint."""
    return [store.missing(checkpoint, extras) for checkpoint in range(store.num_checkpoints)]


def _in_order(parts: list[tuple[Tensor, Features]], examples: range) -> Features:
    """Rows that came in parts, with their positions, in the order of the examples."""
    missing = len(examples) - sum(len(positions) for positions, _ in parts)
    if missing:
        raise RuntimeError(f"{missing} target features never arrived; a rank must have failed")
    order = torch.cat([positions for positions, _ in parts]).argsort()
    return Features(*(column[order] for column in Features.cat([rows for _, rows in parts])))


def _default_shard_size(num_examples: int, loader: DataLoader[Any]) -> int:
    """About 1024 examples, less for small data so that there is work to share, and whole batches."""
    batch = batch_size_of(loader)
    wanted = min(1024, -(-num_examples // 32))
    return batch * max(1, round(wanted / batch))


def _concatenate(parts: list[Scores]) -> Scores:
    if isinstance(parts[0], TopK):
        return TopK(*(torch.cat(column) for column in zip(*parts, strict=True)))
    return torch.cat(cast(list[Tensor], parts))
