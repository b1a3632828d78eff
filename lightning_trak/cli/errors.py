"""Errors of the command line: one line that says what is wrong, what was likely meant, and where help is."""

from __future__ import annotations

import dis
import inspect
import os
import pkgutil
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from traceback import walk_tb
from types import TracebackType
from typing import Any, NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser

from lightning_trak.compatibility import option_names
from lightning_trak.packages import is_a

TRACEBACK = "LIGHTNING_TRAK_TRACEBACK"
USER_ERROR = 2
_PACKAGE = str(Path(__file__).resolve().parents[1]) + os.sep
# Classes that get their arguments from a configuration, some through the user's own classes, such as batch_size and lr.
_CONFIGURED = ("torch.utils.data.", "torch.optim.", "lightning.pytorch.loggers.", "lightning.pytorch.callbacks.")
# Functions that check what a configuration says.
_CHECKS = ("lightning.pytorch.trainer.connectors.", "lightning.fabric.utilities.seed")
# A configuration may name the classes of these modules without their module.
_NAMESPACES = (
    "lightning_trak",
    "lightning_trak.outputs",
    "lightning_trak.projections",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
)


class OneLineParser(LightningArgumentParser):
    """A parser whose errors are one line, and whose ``--targets`` takes several positions."""

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, *rest: Any, **settings: Any
    ) -> Any:
        """Parse arguments, by default those of the process."""
        given = join_numbers(sys.argv[1:] if args is None else args, "--targets")
        try:
            return super().parse_args(given, *rest, **settings)
        except UnicodeDecodeError as error:
            self.error(f"a configuration file is not a text in UTF-8: {error}", error)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line and exit. Where jsonargparse tries one type after the other, raise instead."""
        if not self.exit_on_error or os.environ.get(TRACEBACK):
            self.exit_on_error = False
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        program = parser.prog.replace(" [options]", "")
        fail(program, f"{explain_refusal(message, option_names(parser))} (see {program} --help)")


def fail(program: str, message: str) -> NoReturn:
    """Print a user error in one line, and exit with status 2."""
    print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(USER_ERROR)


def is_user_error(error: BaseException) -> bool:
    """Whether wrong arguments, files or data caused an error, so that its message says all.

    These are errors about a file, wrong settings of the Trainer, all that this package refuses, and arguments that
    torch's loaders and optimizers or Lightning's loggers and callbacks refuse. Other errors, also those of the user's
    own code, need their traceback.
    """
    if os.environ.get(TRACEBACK):
        return False
    if is_a(error, MisconfigurationException) or isinstance(error, FileNotFoundError):
        return True
    if isinstance(error, OSError) and error.filename is not None:
        return True
    expected = (ValueError, TypeError, IndexError, RuntimeError, OSError, ModuleNotFoundError)
    return isinstance(error, expected) and _refused(error.__traceback__)


def without_frame(error: Exception) -> Exception:
    """The error of a class that a configuration names, without what jsonargparse says around it."""
    while isinstance(error.__cause__, Exception) and error.__traceback__ is not None:
        *_, last = walk_tb(error.__traceback__)
        if last[0].f_globals.get("__name__", "").partition(".")[0] != "jsonargparse":
            break
        error = error.__cause__
    return error


def join_numbers(arguments: Iterable[str], option: str) -> list[str]:
    """Write ``option 0 1`` as ``option [0, 1]``, which is how jsonargparse reads a list."""
    joined: list[str] = []
    numbers: list[str] | None = None  # those after the option
    for argument in arguments:
        if numbers is None or not re.fullmatch(r"[+-]?\d+", argument):
            joined.append(argument)
            numbers = [] if argument == option else None
            continue
        if numbers:
            joined.pop()
        numbers.append(argument)
        joined.append(f"[{', '.join(numbers)}]")
    return joined


def explain_refusal(message: str, options: Iterable[str]) -> str:
    """Say in one sentence why jsonargparse refuses an argument or a line of a file.

    Args:
        message: the error of jsonargparse.
        options: options and keys of the parser.

    Returns:
        The sentence, with the likely spelling of an unknown name.
    """
    options = list(options)
    if found := re.search(r"Unexpected config: ?(.*)", message, re.DOTALL):
        said = f"got {found[1].splitlines()[0]}" if found[1].strip() else "got an empty file"
        return f"a configuration has sections, such as model: and data:, with settings in them; {said}"
    if found := re.search(r"Importing '[^']+' is not allowed, denied by .* denylist", message):
        return found[0]
    if found := re.search(r"Option '([\w.]+)' is not accepted", message):
        name = found[1].partition(".")[0]
        classes = re.findall(r"given class_path '([\w.]+)'", message[: found.start()])
        classes = classes[-1:] or re.findall(r"class_path='([\w.]+)'", message[found.end() :])[:1]
        if classes and classes[0].endswith((".LightningModule", ".LightningDataModule")):
            return f"'{name}' is given before its class: put --config, or the option that names the class, first"
        return f"{classes[0] if classes else 'the class'} has no argument '{name}'" + _meant(
            name, [*_arguments(classes), "init_args"]
        )
    if found := re.search(r'Parser key "([\w.]+)":.*(does not correspond to a subclass of \w+)', message, re.DOTALL):
        return f"{found[1]}: the class {found[2]}"
    if found := re.search(r'Parser key "([\w.]+)":.*Expected (\S+) to be a subclass of (.+?)\.\. ', message, re.DOTALL):
        return f"{found[1]}: {found[2]} is no subclass of {found[3]}"
    if found := re.search(r"arguments are required: (\w+)\.(\w+)", message):
        return f"{found[1]} needs --{found[2]}"
    if found := re.search(r"does not accept option '([\w.]+)'", message):
        key = found[1]
        section = key.partition(".")[0]
        known = section in {option.partition(".")[0] for option in options}
        return f"there is no key '{key}'" + _meant(key if known else section, options)
    if found := re.search(r"(?:unrecognized arguments|ambiguous option): (\S+)", message):
        return f"there is no option '{found[1]}'" + _meant(found[1].partition("=")[0], options)
    if found := re.search(r"invalid choice: '?([^'\s]+)'? \(choose from (.*)\)", message):
        choices = re.findall(r"[\w-]+", found[2])
        return f"there is no subcommand '{found[1]}', expected {', '.join(choices)}" + _meant(found[1], choices)
    if found := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        return f"there is no '{found[2]}' in {found[1]}" + _meant(found[2], dir(sys.modules.get(found[1])))
    if found := re.search(r"No module named '([\w.]+)'", message):
        return f"there is no module '{found[1]}'" + _meant(found[1], sys.modules)
    if found := re.search(r"Expected a dot import path string: (\w+)", message):
        classes = [name for module in _NAMESPACES for name in dir(sys.modules.get(module)) if name[0].isupper()]
        return f"there is no class '{found[1]}'; expected a class or its import path" + _meant(found[1], classes)
    return _wrong_type(message) or message


def _wrong_type(message: str) -> str | None:
    """The sentence for a value of a wrong type, or None if the message says something else."""
    parts = re.split(r"(?:Got|Given) value: ", message, maxsplit=1)
    expected = dict.fromkeys(re.findall(r"Expected an? (.+?)(?:\.\s|\s*$)", parts[0], re.MULTILINE))
    keys = re.findall(r'Parser key "([\w.]+)"', parts[0])
    if len(parts) < 2 or not expected or not keys:
        return None
    reasons = re.findall(r"^ *- (?!Expected |Problem with |Not a valid )(.+)", parts[0], re.MULTILINE)
    if reasons:  # more is wrong than a type
        return f"{'.'.join(keys)}: {reasons[0]}"
    kinds = [re.sub(r"<class '(?:.*\.)?(\w+)'>|typing\.Literal\[(.+)\]", r"\1\2", kind) for kind in expected]
    kinds = ["None" if kind == "NoneType" else kind for kind in kinds]
    value = re.split(r"\. Got value|\n", parts[1])[0]
    return f"{'.'.join(keys)}: expected {' or '.join(kinds)}, got {value}"


def _arguments(classes: Sequence[str]) -> Iterator[str]:
    """The names of the arguments of classes, given by their import paths, and of their bases."""
    for path in classes:
        made = pkgutil.resolve_name(path if "." in path else f"lightning_trak.{path}")
        for base in getattr(made, "__mro__", (made,)):
            if base is not object:
                yield from inspect.signature(base).parameters


def _meant(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, list(dict.fromkeys(other for other in known if other != name)), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _refused(traceback: TracebackType | None) -> bool:
    """Whether a ``raise`` statement of this package, or of others' constructors and checks of settings, was last."""
    if traceback is None:
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    frame = traceback.tb_frame
    code = frame.f_code
    if dis.opname[code.co_code[traceback.tb_lasti]] != "RAISE_VARARGS":
        return False
    module: str = frame.f_globals["__name__"]
    configured = module.startswith(_CHECKS) or (code.co_name == "__init__" and module.startswith(_CONFIGURED))
    return configured or code.co_filename.startswith(_PACKAGE)
