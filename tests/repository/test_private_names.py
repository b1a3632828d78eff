"""Private names of other libraries: each is there, and they are used in one module alone."""

import ast
import re
from functools import cache
from importlib.metadata import version
from pathlib import Path

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_trak import compatibility
from lightning_trak.metrics import LinearDatamodelingScore
from tests.lit import make_trainer

PACKAGE = Path(compatibility.__file__).parent
LIBRARIES = {"jsonargparse", "lightning", "lightning_utilities", "safetensors", "torch", "torchmetrics"}
DOCUMENTED = {"_asdict", "_fields", "_replace"}  # of named tuples, in spite of their names
OF_METRICS = {"_apply", "_is_synced", "_plot"}  # what classes derived from Metric inherit
OWN_EVERYWHERE = {"_"}


def module():
    return nn.Linear(1, 1)


def loop():
    return make_trainer().predict_loop


# Name -> the library that has it, what makes an object that has it, and the function that uses it.
NAMES = {
    "_backward_hooks": ("torch", module, "hooks_of"),
    "_backward_pre_hooks": ("torch", module, "hooks_of"),
    "_forward_hooks": ("torch", module, "hooks_of"),
    "_forward_pre_hooks": ("torch", module, "hooks_of"),
    "_modules": ("torch", module, "registered"),
    "_parameters": ("torch", module, "registered"),
    "_buffers": ("torch", module, "registered"),
    "_apply": ("torch", module, "apply_to_tensors"),
    "_compiled_call_impl": ("torch", module, "is_compiled"),
    "_non_persistent_buffers_set": ("torch", module, "transient_buffers"),
    "_reversed_padding_repeated_twice": ("torch", lambda: nn.Conv1d(1, 1, 1), "explicit_padding"),
    "_orig_mod": ("torch", lambda: torch.compile(module()), "original_module"),
    "_torchdynamo_orig_callable": ("torch", lambda: torch.compile(module), "original_function"),
    "_muon": ("torch", lambda: torch.optim, "muon_orthogonalized"),
    "_zeropower_via_newtonschulz": ("torch", lambda: torch.optim._muon, "muon_orthogonalized"),
    "_checkpoint_wrapped_module": ("torch", lambda: checkpoint_wrapper(module()), "WRAPPERS"),
    "_data_connector": ("lightning", make_trainer, "parts_that_a_run_changes"),
    "_logger_connector": ("lightning", make_trainer, "parts_that_a_run_changes"),
    "_data_source": ("lightning", loop, "parts_that_a_run_changes"),
    "_data_fetcher": ("lightning", loop, "is_running"),
    "_signal_connector": ("lightning", make_trainer, "after_signal_handlers"),
    "_device_mesh": ("lightning", L.LightningModule, "set_device_mesh"),
    "_fabric": ("lightning", L.LightningModule, "left_by_fabric"),
    "_fabric_optimizers": ("lightning", L.LightningModule, "left_by_fabric"),
    "_start_method": (
        "lightning",
        lambda: make_trainer(strategy="ddp_spawn", devices=2).strategy.launcher,
        "start_method",
    ),
    "_tensor_parallel_size": ("lightning", ModelParallelStrategy, "tensor_parallel_size"),
    "_option_string_actions": ("jsonargparse", ArgumentParser, "skip_completion"),
    "_actions": ("jsonargparse", ArgumentParser, "option_names"),
}
ELSEWHERE = {"_fsdp_wrapped_module", "_extra_state", "_original_forward"}  # tested below


@pytest.mark.parametrize("name", sorted(NAMES))
def test_the_name_is_there(name):
    library, make, user = NAMES[name]
    if user == "muon_orthogonalized" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    owner = make()
    assert hasattr(owner, name), (
        f"{type(owner).__name__} of {library} {version(library)} has no {name}: find what has taken its place for"
        f" lightning_trak.compatibility.{user}"
    )


@pytest.mark.parametrize("name", sorted(OF_METRICS))
def test_what_metrics_inherit_is_there(name):
    metric = LinearDatamodelingScore(torch.eye(4).bool())
    assert any(name in {**vars(base)} for base in type(metric).__mro__[1:]) or name in vars(metric), (
        f"Metric of torchmetrics {version('torchmetrics')} has no {name}: find what has taken its place for"
        " lightning_trak.metrics.LinearDatamodelingScore"
    )


# ---- They are used in one module alone ----


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name not in OWN_EVERYWHERE


@cache
def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def names_in(path):
    """Private names in a file: those that it defines, those of attributes that it uses, those among its texts."""
    defined, used, texts = set(), {}, {}
    for node in ast.walk(parse(path)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if own and isinstance(node.ctx, ast.Store):
                defined.add(node.attr)
            used.setdefault(node.attr, node.lineno)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"\w+", node.value):
            texts.setdefault(node.value, node.lineno)
    return defined, *({name: line for name, line in of.items() if is_private(name)} for of in (used, texts))


def imports_in(path):
    """Names with dots that a file imports."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


HERE = Path(compatibility.__file__)
OTHERS = sorted(path for path in PACKAGE.rglob("*.py") if path != HERE)


def names_of_others():
    """The private names of other libraries that the module uses."""
    defined, used, texts = names_in(HERE)
    return (used.keys() | texts.keys()) - defined


def test_each_name_of_the_module_is_tested():
    assert names_of_others() == NAMES.keys() | ELSEWHERE


ADVICE = "use a public name, or add a function to lightning_trak/compatibility.py and a test to test_compatibility.py"


def test_no_other_module_imports_private_names():
    found = [
        f"{path.relative_to(PACKAGE)}:{line} imports {name}"
        for path in OTHERS
        for name, line in imports_in(path)
        if name.split(".")[0] in LIBRARIES and any(map(is_private, name.split(".")))
    ]
    assert not found, f"{found}: {ADVICE}"


def test_no_other_module_uses_private_attributes():
    listed, of_package = names_of_others(), set().union(*(names_in(path)[0] for path in OTHERS))
    found = []
    for path in OTHERS:
        defined, used, texts = names_in(path)
        excused = DOCUMENTED | (OF_METRICS if path.parent.name == "metrics" else set())
        foreign = {name: line for name, line in used.items() if name in listed - defined or name not in of_package}
        foreign |= {name: line for name, line in texts.items() if name in listed}
        found += [
            f"{path.relative_to(PACKAGE)}:{line} uses {name}" for name, line in foreign.items() if name not in excused
        ]
    assert not found, f"{found}: {ADVICE}"
