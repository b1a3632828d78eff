"""Chooses the engine that differentiates a model. The first two training examples decide, once."""

from typing import Literal, NamedTuple

import torch

from lightning_trak.features.model import ModelCopy
from lightning_trak.gradients import (
    FunctionalEngine,
    GradientEngine,
    HookEngine,
    LoopEngine,
    MixedEngine,
    coverage_report,
)
from lightning_trak.gradients.base import EngineError
from lightning_trak.gradients.batch import ExampleBatch
from lightning_trak.texts.messages import in_one_line, listed, with_reasons

EngineName = Literal["auto", "functional", "hooks", "loop"]
# From the fastest to the most general.
ENGINES: tuple[EngineName, ...] = ("hooks", "functional", "loop")
_HOW = {"hooks": "module hooks", "functional": "vmap", "loop": "a loop over examples"}


class EngineChoice(NamedTuple):
    """An engine, and why it was chosen.

    Attributes:
        name: ``"hooks"``, ``"functional"`` or ``"loop"``.
        reason: why it was chosen, for log lines.
        engine: the engine itself. It keeps what the check has found out.
    """

    name: EngineName
    reason: str
    engine: GradientEngine


def choose_engine(model: ModelCopy, examples: ExampleBatch, autocast: torch.dtype | None = None) -> EngineChoice:
    """Choose hooks if they cover most of the parameters and agree with autograd on some examples, else vmap.

    If hooks leave out some parameters, vmap differentiates these in a second pass. If hooks leave out most of the
    gradient, vmap does all of it. Examples that cannot be in one batch are differentiated in a loop.

    Args:
        model: the model copy, at a checkpoint.
        examples: examples on the model's device. The choice depends on them, so they should always be the same. Hooks
            cannot be checked on a single example, because it does not show which dimension the examples are in.
        autocast: dtype that the forward passes of hooks are autocast to; None for no autocast.
    """
    if examples.is_one_by_one:
        reason = "the collate function joins examples so that they cannot be taken apart again"
        return EngineChoice("loop", reason, make_engine("loop", model))
    hooks, reason = _checked_hooks(model, examples, autocast)
    if hooks is None:
        return EngineChoice("functional", reason, make_engine("functional", model))
    return EngineChoice("hooks", reason, hooks)


def _checked_hooks(
    model: ModelCopy, examples: ExampleBatch, autocast: torch.dtype | None
) -> tuple[HookEngine | MixedEngine | None, str]:
    """Hooks and what they cover, or None and why they are not used."""
    left_out = HookEngine.uncovered(model.module, model.names)
    report = coverage_report(left_out, model.sizes)
    if 2 * sum(model.sizes[name] for name in left_out) > model.size:
        return None, report
    if examples.size < 2:
        return None, "hooks cannot be checked on a single example"
    with model.differentiable():
        try:
            engine = _hook_engine(model, autocast)
            wrong = engine.check(examples)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # an error of the model itself comes again with the next engine
            return None, f"hooks fail on the first examples: {in_one_line(error)}"
    if wrong:
        return None, with_reasons(wrong)
    if left_out:
        covered = len(model.names) - len(left_out)
        report = f"hooks cover {covered} of {len(model.names)} parameters, and vmap covers {listed(list(left_out))}"
    return engine, report


def make_engine(name: EngineName, model: ModelCopy, autocast: torch.dtype | None = None) -> GradientEngine:
    """Make the engine with a name.

    Args:
        name: ``"hooks"`` (with vmap for the parameters that hooks do not cover), ``"functional"`` (vmap) or
            ``"loop"``.
        model: the model copy to differentiate.
        autocast: dtype that the forward passes of hooks are autocast to; None for no autocast. The other engines
            compute in the precision of the weights.

    Raises:
        EngineError: if hooks cover no parameter.
    """
    if name == "hooks":
        return _hook_engine(model, autocast)
    kind = LoopEngine if name == "loop" else FunctionalEngine
    return kind(model.module, model.output, model.names)


def following_engine(name: EngineName) -> EngineName:
    """The engine to try when this one gets gradients of the model wrong. The loop is the last one."""
    return ENGINES[ENGINES.index(name) + 1]


def how(name: EngineName, autocast: torch.dtype | None) -> str:
    """Describe for log lines how an engine computes gradients."""
    precision = ""
    if autocast:
        precision = " in bfloat16 mixed precision" if name == "hooks" else " in the precision of the weights"
    return _HOW[name] + precision


def _hook_engine(model: ModelCopy, autocast: torch.dtype | None) -> HookEngine | MixedEngine:
    left_out = HookEngine.uncovered(model.module, model.names)
    if len(left_out) == len(model.names):
        raise EngineError(
            f"engine='hooks' cannot be used here: {coverage_report(left_out, model.sizes)}; use engine='auto'"
        )
    if left_out:
        return MixedEngine(model.module, model.output, model.names, left_out, autocast)
    return HookEngine(model.module, model.output, model.names, autocast)
