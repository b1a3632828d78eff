"""``lightning-trak``: train, featurize, score, evaluate, show and clean, from the command line and YAML files.

Start with ``lightning-trak --help`` or ``python -m lightning_trak.cli --help``, and see docs/cli.md. This needs the
extra ``cli``.
"""

import io
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import lightning as L
import torch
from torch import nn

try:
    from jsonargparse import set_parsing_settings
    from jsonargparse.typing import register_type
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'{error}: the command line needs jsonargparse; install it with pip install "lightning-trak[cli]"'
    ) from error

from lightning_trak.cli.config_code import deny_standard_library, require_own_code
from lightning_trak.cli.errors import OneLineParser, fail, is_user_error, without_frame
from lightning_trak.cli.trainer import AttributionTrainer
from lightning_trak.compatibility import skip_completion
from lightning_trak.methods import FeatureMethod, LabelStatistic, Metagradient, TrainingLoss
from lightning_trak.methods.baselines.representations import RepresentationMethod
from lightning_trak.methods.influence.base import Influence

T = TypeVar("T")

# A configuration gives all arguments of a method but the model, which the commands add.
MakeMethod = Callable[[nn.Module], FeatureMethod | Influence | RepresentationMethod | Metagradient | TrainingLoss]
DEFAULT_METHOD = {
    "class_path": "lightning_trak.TRAK",
    "init_args": {"checkpoints": "run/snapshots", "store": "run/features"},
}


class AttributionCLI(LightningCLI):
    """LightningCLI with a section ``method``, and with a subcommand for each method of :class:`AttributionTrainer`."""

    def __init__(self) -> None:
        deny_standard_library()
        about = {"prog": "lightning-trak", "description": "Which training examples made the model do this?"}
        try:
            super().__init__(trainer_class=AttributionTrainer, parser_class=OneLineParser, parser_kwargs=about)
        except Exception as raised:
            error = without_frame(raised)
            if not is_user_error(error):
                raise
            subcommand = self.subcommand if hasattr(self, "config") else None
            fail(f"lightning-trak {subcommand}" if subcommand else "lightning-trak", str(error))

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The subcommands, each with those of its arguments that come from sections of the configuration."""
        return {
            "fit": LightningCLI.subcommands()["fit"],
            "featurize": {"method", "datamodule"},
            "score": {"method", "datamodule"},
            "evaluate": set(),
            "show": {"datamodule", "model", "method"},
            "clean": {"method", "datamodule"},
        }

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add Trainer, model and data. Model and data are not required, because ``evaluate`` takes neither."""
        parser.add_lightning_class_args(AttributionTrainer, "trainer")
        parser.add_lightning_class_args(L.LightningModule, "model", subclass_mode=True, required=False)
        parser.add_lightning_class_args(L.LightningDataModule, "data", subclass_mode=True, required=False)
        # A completion script would list all layers of torch as arguments of this package's own modules.
        skip_completion(parser, "--model")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the section ``method``. All subcommands accept it, so that they can share a file."""
        parser.add_argument("--method", type=MakeMethod, help="The method that featurizes and scores.")
        parser.set_defaults({"method": DEFAULT_METHOD})

    def before_instantiate_classes(self) -> None:
        """Refuse code that a configuration may not name, before any of it is called."""
        require_own_code(self.config)

    # If this class has a method with the name of a subcommand, Lightning calls it instead of the Trainer's method. It
    # passes the subcommand's own arguments, `model`, and `datamodule` if there is one.

    def fit(self, model: L.LightningModule | None, **arguments: Any) -> None:
        """Train the model."""
        self.trainer.fit(self._required("model", model), **arguments)

    def featurize(self, **arguments: Any) -> None:
        """Call the Trainer's method of the same name."""
        self._attribute(AttributionTrainer.featurize, FeatureMethod, **arguments)

    def score(self, **arguments: Any) -> None:
        """Call the Trainer's method of the same name."""
        self._attribute(AttributionTrainer.score, FeatureMethod, **arguments)

    def clean(self, **arguments: Any) -> None:
        """Call the Trainer's method of the same name."""
        self._attribute(AttributionTrainer.clean, LabelStatistic, **arguments)

    def evaluate(self, model: Any, datamodule: Any = None, **arguments: Any) -> None:
        """Call the Trainer's method of the same name. It needs neither model nor data."""
        del model, datamodule
        cast(AttributionTrainer, self.trainer).evaluate(**arguments)

    def show(
        self, model: L.LightningModule | None, datamodule: L.LightningDataModule | None = None, **arguments: Any
    ) -> None:
        """Call the Trainer's method of the same name."""
        data = self._required("data", datamodule)
        method = self._method(self._required("model", model), FeatureMethod) if arguments["predictions"] else None
        cast(AttributionTrainer, self.trainer).show(data, model, method=method, **arguments)

    def _attribute(
        self,
        run: Callable[..., None],
        kind: type[Any],
        model: L.LightningModule | None,
        datamodule: L.LightningDataModule | None = None,
        **arguments: Any,
    ) -> None:
        data, module = self._required("data", datamodule), self._required("model", model)
        run(self.trainer, self._method(module, kind), data, **arguments)

    def _method(self, module: L.LightningModule, kind: type[Any]) -> Any:
        """The method of the configuration, for a model.

        Args:
            module: the model.
            kind: what the method must be.

        Raises:
            ValueError: if it is of another kind, or no checkpoints are named.
        """
        method = self._required("method", self.config_init[self.subcommand].method)(module)
        if not isinstance(method, kind):
            name = type(method).__name__
            raise ValueError(f"{self.subcommand} needs a method over features, such as TRAK, and {name} has none")
        if any(checkpoint.live for checkpoint in getattr(method, "checkpoints", ())):
            raise ValueError(
                "the model of a command is new, so its current weights are not trained: name trained ones with"
                " --method.checkpoints, such as run/snapshots"
            )
        return method

    def _required(self, section: str, value: T | None) -> T:
        if value is None:
            raise ValueError(
                f"{self.subcommand} needs `{section}`: give a class with --{section}, or add this section to a file"
            )
        return value


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"expected the name of a dtype, such as float32, got {name!r}")
    return dtype


def main() -> None:
    """Run ``lightning-trak``."""
    sys.path.insert(0, "")  # so that classes in the working directory are found, as with `python -m`
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not be able to show every character
    set_parsing_settings(add_print_completion_argument=True)
    register_type(torch.dtype, lambda dtype: str(dtype).removeprefix("torch."), _dtype)
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's own use of jsonargparse causes them
    AttributionCLI()
