"""Checks that several functions share: of arguments, and of packages that not all users need."""

import difflib
import inspect
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from numbers import Real
from typing import Any, Literal, TypeVar, get_args, get_type_hints

import torch
from torch import Tensor, nn

Function = TypeVar("Function", bound=Callable[..., Any])


def positive(name: str, value: int) -> int:
    """A positive integer of any type, such as one of NumPy's, as an ``int``.

    Args:
        name: of the argument, for the error.
        value: of the argument.

    Raises:
        ValueError: if the value is not a positive integer. A bool does not count as one.
    """
    if is_integer(value) and operator.index(value) > 0:
        return operator.index(value)
    raise ValueError(f"Expected `{name}` to be a positive integer but got {value!r}.")


def is_integer(value: object) -> bool:
    """Whether a value is an integer of any type, such as one of NumPy's. A bool does not count as one."""
    with suppress(TypeError):  # a Tensor of a fraction has ``__index__``, too
        operator.index(value)  # type: ignore[arg-type]
        return not isinstance(value, bool)
    return False


def integer(name: str, value: int) -> int:
    """An integer of any type, such as one of NumPy's, as an ``int``.

    Args:
        name: of the argument, for the error.
        value: of the argument.

    Raises:
        TypeError: if the value is no integer. A bool does not count as one.
    """
    if not is_integer(value):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    return operator.index(value)


def real(name: str, value: float) -> float:
    """A number of any type, such as one of NumPy's or a Tensor of one, as a ``float``.

    Args:
        name: of the argument, for the error.
        value: of the argument.

    Raises:
        TypeError: if the value is no number. A bool does not count as one.
    """
    if not isinstance(value, (str, bool)):
        with suppress(TypeError, ValueError):
            return float(value)
    raise TypeError(f"{name} must be a number, got {value!r:.80}")


def number_or_auto(name: str, value: float | Literal["auto"], least: float) -> float | Literal["auto"]:
    """A finite number as a ``float``, or ``"auto"``.

    Args:
        name: of the argument, for the error.
        value: of the argument.
        least: the smallest number that is allowed.

    Raises:
        ValueError: if it is smaller, NaN or infinite, a bool, or another word than "auto".
    """
    if value == "auto":
        return value
    number = math.nan
    if isinstance(value, Real) and not isinstance(value, bool):
        with suppress(OverflowError):  # of an integer that no float reaches
            number = float(value)
    if not least <= number < math.inf:
        raise ValueError(f"{name} must be at least {least:g} and finite, or 'auto'; got {value!r}")
    return number


def whole_seed(name: str, value: int) -> int:
    """A seed of any integer type, such as one of NumPy's, as an ``int``.

    Args:
        name: of the argument, for the error.
        value: of the argument.

    Raises:
        ValueError: if the value is not an integer from 0 to 2^32 - 2. The last seed of NumPy is one more.
    """
    if is_integer(value) and 0 <= value <= 2**32 - 2:
        return operator.index(value)
    raise ValueError(f"{name} must be a whole number from 0 to {2**32 - 2}, got {value!r}")


def require_bool(name: str, value: object) -> None:
    """Check a switch. A text such as ``"no"`` would count as true.

    Args:
        name: of the argument, for the error.
        value: what was given for it.

    Raises:
        TypeError: if it is neither True nor False.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {value!r}")


def require_tensor(name: str, value: object) -> None:
    """Check that an argument is a dense tensor of real numbers.

    Arrays and lists have other methods, and fail in the middle of a computation. torch drops imaginary parts.

    Args:
        name: of the argument, for the error.
        value: what was given for it.

    Raises:
        TypeError: if it is something else.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"Expected `{name}` as a torch.Tensor, but got a {type(value).__name__}.")
    if value.is_complex():
        raise TypeError(f"Expected `{name}` as real numbers, but got {value.dtype}.")
    if value.layout != torch.strided:
        raise TypeError(f"Expected `{name}` as a dense tensor, but got {value.layout}. Use `.to_dense()`.")


def require_one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Check an argument that has few values.

    Args:
        name: of the argument, for the error.
        value: what was given for it.
        allowed: its values.

    Raises:
        ValueError: if it is none of them.
    """
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def require_factory(name: str, factory: object) -> None:
    """Check an argument that makes an object in each call. A module can be called, too, but makes nothing.

    Args:
        name: of the argument, for the error.
        factory: what was given for it.

    Raises:
        TypeError: if it makes no objects.
    """
    if not callable(factory) or isinstance(factory, nn.Module):
        raise TypeError(
            f"{name} must be a function that makes a new object in each call, such as a class or a lambda; got a"
            f" {type(factory).__name__}"
        )


@contextmanager
def needs_extra(extra: str, reason: str) -> Iterator[None]:
    """Import a package of an extra inside this context.

    Args:
        extra: of this package.
        reason: what needs which package.

    Raises:
        ModuleNotFoundError: if it is not installed. The error says how to install it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{reason}: pip install "lightning-trak[{extra}]"') from error


def shows_options_of(other: Callable[..., Any] | None) -> Callable[[Function], Function]:
    """A decorator: the function's signature has the arguments that its ``**options: Unpack[...]`` stand for.

    Type checkers read the annotation; ``help()`` and notebooks read the signature.

    Args:
        other: the function that takes the options, whose defaults are shown; None: the default of all is None.
    """
    taken = {} if other is None else inspect.signature(other).parameters

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        *own, options = signature.parameters.values()
        (known,) = get_args(options.annotation)
        hints = get_type_hints(known)
        shown = [options.replace(name=name, kind=options.KEYWORD_ONLY, annotation=hint) for name, hint in hints.items()]
        shown = [each.replace(default=taken[each.name].default if taken else None) for each in shown]
        function.__signature__ = signature.replace(parameters=[*own, *shown])  # type: ignore[attr-defined]
        return function

    return decorate


def require_options(called: Callable[..., Any], options: Iterable[str], known: type) -> None:
    """Check the names of what a function, method or constructor takes as ``**options``.

    A misspelt name must not be left unanswered, and Python's error would name another function, which takes them.

    Args:
        called: what the user has called.
        options: the names that were given.
        known: a TypedDict of all options.

    Raises:
        TypeError: if there is another one. It says the nearest name of an argument, if one is near.
    """
    signature = inspect.signature(called).parameters.values()
    own = {argument.name for argument in signature if argument.kind is not argument.VAR_KEYWORD}
    for name in options:
        if name not in known.__annotations__:
            names = sorted({*own, *known.__annotations__})
            near = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
            raise TypeError(f"{called.__name__} got an unexpected keyword argument {name!r}: {hint}")
