"""A configuration cannot run commands. Each attack would make a file in the working directory."""

import sys

import pytest
import yaml

from lightning_trak.cli.commands import main

OWN = """
import functools
import subprocess

import torch
from subprocess import getoutput as renamed
from numpy.testing import runstring
from typing import Any, Callable

from examples.digits import LitDigits

bound = functools.partial(subprocess.getoutput, "touch made")
cached = functools.lru_cache(subprocess.getoutput)


def forward(module, batch):
    return module(batch[0])


@torch.no_grad()
def decorated(module, batch):
    return module(batch[0])


def make(width: int = 1) -> LitDigits:
    return LitDigits()


class Caller:
    def __call__(self, module, batch):
        return module(batch[0])


caller = Caller()


class Own(LitDigits):
    def __init__(self, anything: Any = None, several: list[Any] = [], function: Callable[[str], Any] | None = None):
        super().__init__()
        print("anything is", type(anything).__name__)
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Featurizes with sections of a file; gives what was said and whether a file was made."""
    (tmp_path / "own_code.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_code", raising=False)

    def run(**sections):
        base = {
            "model": "examples.digits.LitDigits",
            "data": "examples.digits_data.DigitsData",
            "trainer": {"logger": False, "enable_checkpointing": False},
        }
        (tmp_path / "config.yaml").write_text(yaml.dump(base | sections))
        monkeypatch.setattr(sys, "argv", ["lightning-trak", "featurize", "--config", "config.yaml"])
        monkeypatch.setattr(sys, "path", list(sys.path))
        try:
            main()
        except (SystemExit, Exception) as error:
            printed = capsys.readouterr()
            return f"{printed.out} {printed.err} {error}"
        finally:
            assert not (tmp_path / "made").exists()
            assert "own_code" not in sys.modules or sys.modules["own_code"].__file__.startswith(str(tmp_path))
        raise AssertionError("there are no snapshots, so that featurizing should have failed")

    return run


def named(path, **arguments):
    return {"class_path": path, "init_args": arguments}


def method(forward):
    output = named("lightning_trak.outputs.ClassificationMargin", forward=forward)
    return {"method": named("lightning_trak.TRAK", checkpoints="snapshots", store="features", output=output)}


PYTHON = "__import__('os').system('touch made')"
STANDARD = "is not allowed, denied by"
FOREIGN = "that is not from your own code; a configuration may only name functions of your own modules"
OTHER_KIND = "correspond to a subclass of LightningModule"
ARRIVED = '"snapshots" is not a directory that TRAKCallback has written'


ATTACKS = {
    "method": ({"method": named("os.system", command="touch made")}, STANDARD),
    "output": (method(named("subprocess.getoutput", cmd="touch made")), STANDARD),
    "exported again by torch": (method(named("torch.os.system", command="touch made")), STANDARD),
    "under another name": (method(named("own_code.renamed", cmd="touch made")), STANDARD),
    "partial": (method("own_code.bound"), STANDARD),
    "wrapped": (method("own_code.cached"), STANDARD),
    "script": (method(named("runpy.run_path", path_name="own_code.py")), STANDARD),
    "builtin": (method(named("builtins.eval", source=PYTHON)), STANDARD),
    "class": (method(named("subprocess.Popen", args=["touch", "made"])), STANDARD),
    "other packages": (method(named("numpy.testing.runstring", astr=PYTHON, dict={})), FOREIGN),
    "other packages, not called": (method("torch.utils.collect_env.run"), FOREIGN),
    "by way of the own module": (method(named("own_code.runstring", astr=PYTHON, dict={})), FOREIGN),
    "this package": (method("lightning_trak.storage.files.write_atomically"), FOREIGN),
    "pickles": (method(named("torch.load", f="x.pt", weights_only=False)), FOREIGN),
    "where anything will do": (
        {"model": named("own_code.Own", anything=named("numpy.testing.runstring", astr=PYTHON, dict={}))},
        FOREIGN,
    ),
    "in a list": (
        {"model": named("own_code.Own", several=[named("numpy.testing.runstring", astr=PYTHON, dict={})])},
        FOREIGN,
    ),
    "any function": (
        {"model": named("own_code.Own", function={"class_path": "sympy.Lambda", "dict_kwargs": {"expr": PYTHON}})},
        FOREIGN,
    ),
    "objects that are called": ({"model": named("own_code.Own", function="numpy.vectorize")}, FOREIGN),
    "model": ({"model": named("own_code.renamed", cmd="touch made")}, STANDARD),
    "class method": (
        {"model": named("examples.digits.LitDigits.load_from_checkpoint", checkpoint_path="x", weights_only=False)},
        OTHER_KIND,
    ),
    "callback": (
        {
            "trainer": {
                "callbacks": [
                    named(
                        "lightning.pytorch.callbacks.LambdaCallback",
                        setup=named("numpy.testing.runstring", astr=PYTHON, dict={}),
                    )
                ]
            }
        },
        FOREIGN,
    ),
    "optimizer": ({"optimizer": named("os.system", command="touch made")}, STANDARD),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sections", "refusal"),
    ATTACKS.values(),
    ids=ATTACKS,
)
def test_commands_are_refused(run, sections, refusal):
    said = run(**sections)
    assert refusal in said
    assert ARRIVED not in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "forward",
    ["own_code.forward", "own_code.decorated", "own_code.caller", "own_code.Caller", named("own_code.Caller")],
)
def test_own_functions_are_accepted(run, forward):
    assert ARRIVED in run(**method(forward))


def test_own_factories_are_accepted_and_nothing_is_made_where_anything_will_do(run):
    assert ARRIVED in run(model=named("own_code.make", width=2), **method("own_code.forward"))
    said = run(model=named("own_code.Own", anything=named("own_code.Caller")), **method("own_code.forward"))
    assert "anything is Namespace" in said
    assert ARRIVED in said


def test_a_dtype_is_no_other_thing_of_torch(run):
    said = run(method=named("lightning_trak.TRAK", checkpoints="snapshots", store="features", dtype="load"))
    assert "expected the name of a dtype, such as float32, got 'load'" in said
