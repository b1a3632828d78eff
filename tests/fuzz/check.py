"""Holds what the package makes of a specification against autograd, one example at a time."""

import functools
import logging
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from hypothesis import reject
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_trak
from lightning_trak import GradientDot
from lightning_trak.checkpoints.digests import weights_digest
from lightning_trak.features.model import stream_of
from lightning_trak.projections import IdentityProjection, Projection
from tests.fuzz.data import Collate, Examples
from tests.fuzz.models import make_checkpoints, make_model, make_output, plain_output, selected
from tests.fuzz.parts import Level
from tests.fuzz.specs import Spec

ENGINES = ("auto", "functional", "hooks", "loop")
TOLERANCE = 1e-6  # of a score, relative to the norms of the two gradients
Compute = Callable[[GradientDot, L.Trainer, DataLoader, DataLoader], Any]  # the loaders of training set and targets
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # stores are flushed to disk, which takes its time
PACKAGE = str(Path(lightning_trak.__file__).parent)


class WrongScoreError(AssertionError):
    """The package gave a number, and it is not the right one."""


class InternalError(AssertionError):
    """The package failed with something else than a sentence of its own."""


class NeedlessRefusalError(AssertionError):
    """The package refused what it must be able to do."""


class TouchedError(AssertionError):
    """The user's module is not as it was."""


class Gradients(NamedTuple):
    """Of some examples at one checkpoint.

    Attributes:
        rows: by name of the parameter, each of shape (examples, numbers).
        loss_gradients: minus the derivative of the loss by the output.
        any_used: whether some example's output depends on some of the parameters.
    """

    rows: dict[str, Tensor]
    loss_gradients: Tensor
    any_used: bool

    def flat(self) -> Tensor:
        return torch.cat(list(self.rows.values()), 1)


def reference(spec: Spec, weights: dict[str, Tensor], examples: Examples) -> Gradients:
    """Gradients by a model and a batch of its own for each example, and without the package."""
    rows, loss_gradients, any_used = [], [], False
    for item in examples:
        model = make_model(spec)
        model.load_state_dict(weights)
        wanted = {name: parameter for name, parameter in model.named_parameters() if name in selected(spec, model)}
        value, loss_gradient = plain_output(spec, model, Collate(spec)([item]))
        assert value.shape == (1,), f"the specification's output has shape {tuple(value.shape)}"
        found = [None] * len(wanted)
        if value.requires_grad:
            try:
                found = torch.autograd.grad(value.sum(), list(wanted.values()), allow_unused=True)
            except RuntimeError as error:
                if "modified by an inplace operation" in str(error):
                    reject()  # a part that changes its weights, used twice: not even autograd can differentiate it
                raise
        any_used |= any(gradient is not None and gradient.numel() > 0 for gradient in found)
        rows.append(
            {
                name: (torch.zeros_like(parameter) if gradient is None else gradient.to_dense()).detach().flatten()
                for (name, parameter), gradient in zip(wanted.items(), found, strict=True)
            }
        )
        loss_gradients.append(loss_gradient)
    stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return Gradients(stacked, torch.cat(loss_gradients), any_used)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what Lightning and the package say beside their results."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning_trak")]
    levels = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@functools.cache
def trainer(precision: str) -> L.Trainer:
    """One for all specifications, as in a notebook."""
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        precision=precision,
    )


def refused(error: Exception) -> bool:
    """Whether it is a sentence of the package's own: raised by the package itself, of a kind for users, with advice."""
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    words = str(error)
    return (
        isinstance(error, (ValueError, TypeError))
        and raised_in.startswith(PACKAGE)
        and len(words.split()) >= 6
        and "Traceback" not in words
    )


class Run:
    """A specification, with what is right for it, made ready to be attributed by some engine.

    Args:
        spec: the specification.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.checkpoints = make_checkpoints(spec)
        self.shard_size = spec.batch * (-(-len(spec.train) // spec.batch) if "one_shard" in spec.habits else 1)
        self.train, self.targets = (
            Examples(spec, spec.train, 2 * spec.seed),
            Examples(spec, spec.targets, 2 * spec.seed + 1),
        )
        self.right_train = [reference(spec, weights, self.train) for weights in self.checkpoints]
        self.right_targets = [reference(spec, weights, self.targets) for weights in self.checkpoints]
        # An output that depends on no parameter may be refused.
        self.level = spec.level if all(right.any_used for right in self.right_train) else Level.WILD

    def by_engine(self, engine: str, projection: Projection, compute: Compute) -> Any:
        """What the package computes by one engine; None if it refuses and may.

        Raises:
            InternalError, NeedlessRefusalError, TouchedError: see there.
        """
        spec = self.spec
        must = self.level == Level.PLAIN or (self.level == Level.ODD and engine in ("auto", "loop"))
        model = make_model(spec)
        names = None if spec.selection == "all" else selected(spec, model)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        batches = Collate(spec)
        train = DataLoader(self.train, batch_size=spec.batch, collate_fn=batches)
        targets = DataLoader(self.targets, batch_size=spec.target_batch, collate_fn=batches)
        with quiet(), tempfile.TemporaryDirectory(dir=MEMORY) as store:
            try:
                method = GradientDot(
                    model,
                    [dict(weights) for weights in self.checkpoints],
                    store,
                    output=None if "lightning" in spec.habits else make_output(spec),
                    projection=projection,
                    parameters=names,
                    engine=engine,
                    dtype=torch.float64,
                    effect_on="output",
                    # What is wild is left to the audit, which is a sample: here of everything.
                    audit=0 if "unaudited" in spec.habits else 64 if spec.level == Level.WILD else 2,
                )
                precision = "64-true" if "double_precision" in spec.habits else "32-true"
                found = compute(method, trainer(precision), train, targets)
            except Exception as error:
                if not refused(error):
                    raise InternalError(f"engine={engine!r}: {type(error).__name__}: {error}\n{spec}") from error
                if must and "Use score()" not in str(error):  # batches that were scored before cannot be taken back
                    raise NeedlessRefusalError(f"engine={engine!r}: {error}\n{spec}") from error
                found = None
        after = model.state_dict()
        if any(not torch.equal(after[name], value) for name, value in before.items()):
            raise TouchedError(f"engine={engine!r} changed the user's weights or buffers\n{spec}")
        if any(parameter.grad is not None for parameter in model.parameters()):
            raise TouchedError(f"engine={engine!r} left gradients in the user's module\n{spec}")
        return found


def check_scores(spec: Spec, engines: tuple[str, ...] = ENGINES, streamed: bool = False) -> None:
    """Scores by every engine, against products of reference gradients.

    Args:
        spec: the specification.
        engines: what to try.
        streamed: by ``trainer.predict(method.scorer(), loader)``, in place of ``method.score``.

    Raises:
        WrongScoreError, InternalError, NeedlessRefusalError, TouchedError: see there.
    """
    run = Run(spec)
    expected, scale = 0.0, 0.0
    for train, targets in zip(run.right_train, run.right_targets, strict=True):
        weighted, rows = train.flat() * train.loss_gradients[:, None], targets.flat()
        expected = expected + rows @ weighted.T / len(run.checkpoints)
        scale = scale + torch.outer(rows.norm(dim=1), weighted.norm(dim=1)) / len(run.checkpoints)

    def compute(method: GradientDot, trainer: L.Trainer, train: DataLoader, targets: DataLoader) -> Tensor:
        method.featurize(trainer, train, run.shard_size)
        if streamed:
            return torch.cat(trainer.predict(method.scorer(), targets))
        return method.score(trainer, targets)

    for engine in engines:
        scores = run.by_engine(engine, IdentityProjection(), compute)
        if scores is not None:
            _compare(scores, expected, scale, f"scores by engine={engine!r}\n{spec}")


def check_features(spec: Spec, projection: Projection, engines: tuple[str, ...] = ENGINES) -> None:
    """Projected gradients of targets by every engine, against the projection of reference gradients.

    Raises:
        WrongScoreError, InternalError, NeedlessRefusalError, TouchedError: see there.
    """
    run = Run(spec)
    shapes = {name: parameter.shape for name, parameter in make_model(spec).named_parameters()}

    def compute(method: GradientDot, trainer: L.Trainer, train: DataLoader, targets: DataLoader) -> list[Any]:
        method.featurize(trainer, train, run.shard_size)
        return method.target_features(trainer, targets)

    for engine in engines:
        found = run.by_engine(engine, projection, compute)
        for number, (features, known) in enumerate(zip(found or [], run.right_targets, strict=bool(found))):
            own = {name: shapes[name] for name in known.rows}
            stream = stream_of(weights_digest(run.checkpoints[number]))
            bound = projection.bind(own, seed=0, checkpoint=stream, device=torch.device("cpu"))
            expected = torch.zeros(len(run.targets), bound.dim, dtype=torch.float64)
            for name, rows in known.rows.items():
                bound.add_(expected, name, rows)
            where = f"at checkpoint {number} by engine={engine!r}, {projection}\n{spec}"
            scale = known.flat().norm(dim=1, keepdim=True)
            _compare(features.features, expected, scale, f"features {where}")
            expected = known.loss_gradients
            _compare(features.loss_gradients, expected, expected.abs(), f"loss gradients {where}")


def _compare(found: Tensor, expected: Tensor, scale: Tensor, where: str) -> None:
    if found.shape != expected.shape:
        raise WrongScoreError(f"{where}: shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
    error = (found.double() - expected).abs()
    if not (error <= TOLERANCE * scale + 1e-12).all():
        worst = float((error / (scale + 1e-12)).max())
        raise WrongScoreError(f"off by {worst:.2g} of their scale: {where}\n{found}\n{expected}")
