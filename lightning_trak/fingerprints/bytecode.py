"""Reads a function's bytecode: what it computes, which names it reads, and what it changes.

Bytecode is the code that runs. A lambda and a function from a notebook have it, too. It stays the same if a file is
edited after its import. It differs between Python's minor versions.
"""

import dis
import hashlib
import types
from collections.abc import Iterator
from functools import cache
from typing import Any

# Methods that change a container. Methods that change a tensor end in an underscore.
_MUTATORS = frozenset(
    [
        "__setitem__", "add", "append", "appendleft", "clear", "discard", "extend", "insert", "pop", "popitem",
        "popleft", "remove", "reverse", "setdefault", "sort", "update",
    ]
)  # fmt: skip
_STORES = ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "STORE_DEREF")
_LOADS = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF")
_ATTRIBUTES = ("STORE_ATTR", "DELETE_ATTR", "LOAD_ATTR", "LOAD_METHOD")
_CONSTANT = frozenset(dis.hasconst)


@cache
def _instructions(code: types.CodeType) -> list[dis.Instruction]:
    return list(dis.get_instructions(code))


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code, and the code of all functions that are defined inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)


@cache
def code_digest(code: types.CodeType) -> str:
    """A digest of what the code does. File, line numbers, comments and docstring do not count."""
    return hashlib.sha256(repr(_content(code)).encode()).hexdigest()[:16]


def _content(code: types.CodeType) -> Any:
    arguments = code.co_argcount + code.co_kwonlyargcount
    return [
        [
            (one.opname, _constant(one.argval) if one.opcode in _CONSTANT else one.argrepr)
            for one in _instructions(code)
        ],
        [code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_varnames[:arguments]],
        code.co_flags & 0x2AC,  # *args, **kwargs, generators and coroutines
        getattr(code, "co_exceptiontable", b""),
    ]


def _constant(value: Any) -> Any:
    if isinstance(value, types.CodeType):
        return _content(value)
    return sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value)


@cache
def names(code: types.CodeType) -> frozenset[str]:
    """Names of globals and attributes that the code may read, and its strings, which may be arguments of getattr."""
    found: set[str] = set()
    for part in _nested(code):
        found.update(part.co_names)
        found.update(word for constant in part.co_consts for word in _strings(constant))
    return frozenset(found)


def _strings(constant: Any) -> Iterator[str]:
    if isinstance(constant, str):
        yield constant
    elif isinstance(constant, (tuple, frozenset)):
        for item in constant:
            yield from _strings(item)


@cache
def references(code: types.CodeType) -> list[tuple[str, tuple[str, ...]]]:
    """Globals and variables of enclosing functions that the code reads, each with the attributes that it reads of them.

    ``config.scale * weights`` reads ``("config", ("scale",))`` and ``("weights", ())``.
    """
    found: dict[tuple[str, tuple[str, ...]], None] = {}
    for part in _nested(code):
        instructions = _instructions(part)
        for index, one in enumerate(instructions):
            if one.opname in ("LOAD_GLOBAL", "LOAD_NAME") or ("DEREF" in one.opname and one.opname.startswith("LOAD_")):
                path = []
                for following in instructions[index + 1 :]:
                    if following.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
                        break
                    path.append(following.argval)
                found[one.argval, tuple(path)] = None
    return sorted(found)


@cache
def changes(code: types.CodeType) -> frozenset[tuple[str, str]]:
    """Names outside the code that it assigns to, or whose container or tensor it changes in place.

    Returns:
        Pairs of a name and its kind: ``"self"`` is an attribute of the first argument, ``"other"`` is an attribute of
        another object, and ``"scope"`` is a global or a variable of an enclosing function.
    """
    found: set[tuple[str, str]] = set()
    for part in _nested(code):
        lines, first = _instructions(part), part.co_varnames[: min(1, part.co_argcount)]
        local = {one.argval for i, one in enumerate(lines) if one.opname.startswith("LOAD_FAST") and _mutated(lines, i)}
        for i, one in enumerate(lines):
            changed = one.opname in _LOADS and (_mutated(lines, i) or _kept_as(lines[i + 1]) in local)
            if changed or one.opname in _STORES:
                of_self = _owner(lines, i) in first
                found.add((one.argval, "scope" if one.opname not in _ATTRIBUTES else "self" if of_self else "other"))
    return frozenset(found)


def _kept_as(one: dis.Instruction) -> Any:
    """The local variable that an instruction stores to."""
    return one.argval if one.opname == "STORE_FAST" else None


def _owner(instructions: list[dis.Instruction], index: int) -> Any:
    """The local variable whose attribute an instruction loads or stores."""
    if index and instructions[index - 1].opname in ("SWAP", "ROT_TWO"):  # self.count += 1
        name = instructions[index].argval
        loads = [i for i in range(index) if instructions[i].opname == "LOAD_ATTR" and instructions[i].argval == name]
        index = loads[-1] - 1 if loads else 0
    before = instructions[index - 1].argval if index else None
    # Newer versions of Python load two variables at once.
    return before[-1] if isinstance(before, tuple) and before else before


def _mutated(instructions: list[dis.Instruction], start: int) -> bool:
    """Whether the expression around an instruction changes the object that it loads, or an item of this object."""
    depth, previous = 1, instructions[start]  # depth of the stack above the loaded object
    for one in instructions[start + 1 :]:
        if depth == 1 and one.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            name = one.argval
            return name in _MUTATORS or (name.endswith("_") and not name.endswith("__"))
        if one.opname in ("STORE_SUBSCR", "DELETE_SUBSCR"):
            # In `x[i] += 1`, a swap puts the value below the container.
            return depth == 2 or (depth == 3 and previous.opname in ("SWAP", "ROT_THREE"))
        if one.opname == "STORE_SLICE":
            return depth == 3
        if one.opcode in dis.hasjrel or one.opcode in dis.hasjabs or one.opname.startswith("RETURN"):
            return False
        depth += dis.stack_effect(one.opcode, one.arg, jump=False)
        if depth <= 0:
            return False
        previous = one
    return False
