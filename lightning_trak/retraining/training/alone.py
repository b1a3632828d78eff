"""Training of one member of a fleet, from new weights to the end, and its outputs after training."""

import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.seed import seed_everything
from lightning.pytorch.callbacks import Timer
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

from lightning_trak.gradients.precision import WorkingPrecision
from lightning_trak.outputs import ModelOutput
from lightning_trak.outputs.evaluating import exact_attention
from lightning_trak.packages import is_a
from lightning_trak.running.batches import TransferHooks, on_device
from lightning_trak.running.data.loaders import like
from lightning_trak.running.data.loading import num_examples
from lightning_trak.running.random_states import isolated_random_states
from lightning_trak.running.trainers import first_batches_alone


class FactoryError(ValueError):
    """A factory returned something that cannot train any member. It stops the whole fleet, not one member."""


class NothingTwice:
    """Refuses an object that a factory has returned before.

    A module that is trained already would be trained further, and a used Trainer would take no step. This class
    remembers Trainers, their callbacks and strategies, and parameters, as long as they exist. Parameters are
    remembered since a new module may hold a trained network.
    """

    def __init__(self) -> None:
        self._seen: weakref.WeakValueDictionary[int, object] = weakref.WeakValueDictionary()

    def module(self, module: Any) -> L.LightningModule:
        """Check and remember a module from ``make_module``.

        Raises:
            FactoryError: if it is not a LightningModule, or has parameters of an earlier module.
        """
        if not is_a(module, L.LightningModule):
            raise FactoryError(f"make_module() must return a LightningModule, got {type(module).__name__}")
        for name, parameter in module.named_parameters():
            self._note(
                parameter,
                f'make_module() returned the parameter "{name}" of an earlier call again, so a member would start from'
                " another member's weights; make a new module and new networks in each call",
            )
        return module

    def trainer(self, trainer: Any) -> L.Trainer:
        """Check and remember a Trainer from ``make_trainer``.

        Raises:
            FactoryError: if it is not a Trainer; if it, a callback or its strategy was used or returned before; or if
                it runs several processes, or would train on the first batches only.
        """
        if not is_a(trainer, L.Trainer):
            raise FactoryError(f"make_trainer() must return a Trainer, got {type(trainer).__name__}")
        again = "make_trainer() returned {} that an earlier call {}; make {} in each call"
        self._note(trainer, again.format("the same Trainer", "returned, too", "a new one"))
        if trainer.state.fn is not None:
            raise FactoryError(again.format("a Trainer", "has used", "a new one"))
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        for part in (*callbacks, trainer.strategy):
            kind = type(part).__name__
            self._note(part, again.format(f"a Trainer with the same {kind}", "returned, with its state", "new ones"))
        if trainer.world_size > 1:
            raise FactoryError(
                f"make_trainer() returned a Trainer of {trainer.world_size} processes, but one process trains a member:"
                ' use devices=1, and divide the members among processes by run(part="1/2") and run(part="2/2")'
            )
        setting = first_batches_alone(trainer)
        if setting is not None:
            raise FactoryError(
                f"make_trainer() returned a Trainer with {setting}, which trains on the first batches of a subset only,"
                " so its members would be no ground truth: leave it out; max_epochs or max_steps make training shorter"
            )
        return trainer

    def loader(self, loader: DataLoader[Any]) -> None:
        """Check and remember the random generator of a loader from ``make_loader``, if it has one.

        Raises:
            FactoryError: if an earlier loader has it.
        """
        if loader.generator is not None:
            self._note(
                loader.generator,
                "make_loader() returned a loader with the generator of an earlier call, so the order of a member's data"
                " would depend on which members were trained before it; leave generator= out, or make a new one in each"
                " call",
            )

    def _note(self, thing: object, message: str) -> None:
        if self._seen.get(id(thing)) is thing:
            raise FactoryError(message)
        self._seen[id(thing)] = thing


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed everything inside this context. Random states and environment are restored at its end, after errors, too."""
    names = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")
    environment = {name: os.environ.get(name) for name in names}
    try:
        with isolated_random_states():
            seed_everything(seed, workers=True, verbose=False)
            yield
    finally:
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def shuffled_like(loader: DataLoader[Any]) -> Callable[[Dataset[Any]], DataLoader[Any]]:
    """A function that makes the loader of a subset like the loader of the whole training set, in random order.

    Raises:
        ValueError: if the loader has another order than sequential or random.
    """
    batches: Any = loader.batch_sampler  # it has the order and size of batches, also if the user made it
    sampler = getattr(batches, "sampler", loader.sampler)
    if type(batches) is not BatchSampler or not (type(sampler) is SequentialSampler or is_permuting(sampler)):
        raise ValueError(
            f"train has a {type(batches).__name__} with a {type(sampler).__name__}, and a subset may need other ones:"
            " pass make_loader=, a function that makes the loader of a subset"
        )
    size, drop_last = batches.batch_size, batches.drop_last
    return lambda dataset: like(loader, dataset, batch_size=size, shuffle=True, drop_last=drop_last)


def is_permuting(sampler: Any) -> bool:
    """Whether a sampler draws each example once, in random order."""
    return type(sampler) is RandomSampler and not sampler.replacement and len(sampler) == len(sampler.data_source)


def require_own_seed(seed: int) -> None:
    """Check that nothing has replaced the seed that :func:`seeded` or ``torch.manual_seed`` has set.

    Raises:
        FactoryError: if something has.
    """
    if torch.initial_seed() != seed:
        raise FactoryError(
            f"make_module(), make_trainer(), make_loader() or a hook of the module sets the random seed"
            f" {torch.initial_seed()}, such as by seed_everything or torch.manual_seed, so all members would have the"
            " same initialisation or order of data, and repetitions would hide the noise of training; leave it out,"
            " since each member has a seed of its own (random numbers that should be fixed: draw them within"
            " torch.random.fork_rng)"
        )


class _FromScratch(L.Callback):
    """Raises an error if a fit continues from a checkpoint, for example because of SLURM's automatic requeueing.

    Args:
        seed: of the member. Another one is refused, too.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        require_own_seed(self._seed)
        if trainer.global_step or trainer.current_epoch:
            raise RuntimeError(
                f"training began at step {trainer.global_step}, epoch {trainer.current_epoch}: the Trainer has found"
                f' a checkpoint, perhaps in "{trainer.default_root_dir}"; give every member such a directory of its own'
            )


def train_alone(module: L.LightningModule, trainer: L.Trainer, loader: DataLoader[Any], seed: int) -> dict[str, int]:
    """Fit a new module with a new Trainer.

    Args:
        module: the module.
        trainer: the Trainer.
        loader: the training data.
        seed: the random seed that was set before the module was made.

    Returns:
        The number of optimizer steps, ``"steps"``, and of epochs, ``"epochs"``.

    Raises:
        RuntimeError: if training took too few steps and no callback stopped it early, or a clock did.
        FactoryError: if something has set another seed before the first step.
    """
    trainer.callbacks.append(_FromScratch(seed))  # type: ignore[attr-defined]
    trainer.fit(module, loader)
    if trainer.interrupted:
        raise KeyboardInterrupt
    steps, epochs = trainer.global_step, trainer.current_epoch
    max_epochs = -1 if trainer.max_epochs is None else trainer.max_epochs
    full = 0 <= trainer.max_steps <= steps or 0 <= max_epochs <= epochs
    if not full and _out_of_time(trainer):
        raise RuntimeError(
            f"training took {steps} steps in {epochs} epochs, and was then stopped by max_time or a Timer: how far it"
            " comes in that time depends on the machine, so its outputs are no ground truth; give it more time, or end"
            " it by max_epochs or max_steps"
        )
    if steps == 0 or not (full or trainer.should_stop):
        raise RuntimeError(
            f"training took {steps} steps in {epochs} epochs, but the Trainer has max_steps={trainer.max_steps},"
            f" max_epochs={max_epochs} and limit_train_batches={trainer.limit_train_batches}, over {len(loader)}"
            " batches; no callback stopped it early"
        )
    return {"steps": steps, "epochs": epochs}


def _out_of_time(trainer: L.Trainer) -> bool:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    left = [callback.time_remaining() for callback in callbacks if is_a(callback, Timer)]
    return any(seconds is not None and seconds <= 0 for seconds in left)


def outputs_of(
    module: L.LightningModule,
    output: ModelOutput,
    targets: DataLoader[Any],
    context: DataLoader[Any],
    device: torch.device,
) -> Tensor:
    """The declared output at each target, in eval mode and in the precision of the weights, but in float32 at least.

    Args:
        module: a trained module. Its weights in half precision become float32. Its own batch transfer hooks run, but
            its ``predict_step`` does not.
        output: the output. It keeps the context that is made for this module.
        targets: batches of targets, in order.
        context: batches of training data, for an output that needs a context.
        device: the device to compute on.

    Returns:
        The outputs, float32 of shape ``(num_targets,)``, on the CPU.
    """
    module.to(device).eval()
    precision, hooks = WorkingPrecision(module), TransferHooks(module)

    def moved(batches: DataLoader[Any]) -> Iterator[Any]:
        return on_device(batches, module.device, precision.convert_input, hooks)

    with torch.no_grad(), exact_attention(), precision.active():
        if output.context_size:
            output.set_context(output.make_context(module, moved(context)))
        found = [output.output(module, batch).float().cpu() for batch in moved(targets)]
    module.cpu()
    return joined(found, output, (num_examples(targets),))


def joined(found: Sequence[Tensor], output: ModelOutput, shape: tuple[int, ...]) -> Tensor:
    """Outputs of batches of targets as one tensor.

    Args:
        found: of each batch, with the targets in the last dimension.
        output: the output.
        shape: of the result.

    Raises:
        FactoryError: if the output does not give one number per target.
    """
    if any(values.ndim != len(shape) for values in found) or sum(values.shape[-1] for values in found) != shape[-1]:
        received = tuple(found[0].shape[len(shape) - 1 :])
        raise FactoryError(
            f"{type(output).__name__}.output returned shape {received} for the first of {len(found)} batches of"
            f" {shape[-1]} targets; expected one number per target, shape (batch,)"
        )
    return torch.cat(list(found), dim=-1)
