"""The command line without a run: settings of methods, completion, terminals."""

import io
import sys

import pytest
import yaml

from lightning_trak.cli.commands import AttributionCLI
from tests.cli.command_line import CONFIG, command_line

pytestmark = pytest.mark.slow


def test_settings_of_the_method(monkeypatch, capsys):
    settings = [
        "--method.checkpoints",
        "[a.ckpt, b.ckpt]",
        "--method.parameters",
        "head.*",
        "--method.dtype",
        "float16",
    ]
    with pytest.raises(SystemExit, match="0"):
        command_line(monkeypatch, "score", "--config", CONFIG, *settings, "--method.dtype", "float16", "--print_config")
    printed = yaml.safe_load(capsys.readouterr().out)["method"]
    assert printed["class_path"] == "lightning_trak.TRAK"
    found = printed["init_args"]
    assert (found["checkpoints"], found["parameters"], found["dtype"]) == (["a.ckpt", "b.ckpt"], "head.*", "float16")
    assert found["projection"]["init_args"]["dim"] == 1024


@pytest.mark.parametrize("method", ["TRAK", "EKFACInfluence", "TrainingLoss"])
@pytest.mark.parametrize(
    ("given", "expected"), [("[a.ckpt, b.ckpt]", ["a.ckpt", "b.ckpt"]), ("run/snapshots", "run/snapshots")]
)
def test_checkpoints_are_a_path_or_a_list(monkeypatch, capsys, method, given, expected):
    settings = ["--method", method, "--method.checkpoints", given]
    with pytest.raises(SystemExit, match="0"):
        command_line(monkeypatch, "clean", "--config", CONFIG, *settings, "--print_config")
    assert yaml.safe_load(capsys.readouterr().out)["method"]["init_args"]["checkpoints"] == expected


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8", "int4"])
def test_every_dtype_has_a_name(monkeypatch, capsys, dtype):
    with pytest.raises(SystemExit, match="0"):
        command_line(monkeypatch, "score", "--config", CONFIG, "--method.dtype", dtype, "--print_config")
    assert yaml.safe_load(capsys.readouterr().out)["method"]["init_args"]["dtype"] == dtype


def test_completion(monkeypatch, capsys):
    class OneCommand(AttributionCLI):  # all of them take half a minute
        @staticmethod
        def subcommands():
            return {"evaluate": set()}

    monkeypatch.setattr(sys, "argv", ["lightning-trak", "--print_completion", "shtab-bash"])
    with pytest.raises(SystemExit):
        OneCommand()
    script = capsys.readouterr().out
    assert "complete -o bashdefault -F _shtab_lightning_trak lightning-trak" in script
    assert "--ground_truth" in script
    assert "gauss_newton identity" in script


def test_a_terminal_need_not_have_every_letter(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit, match="0"):
        command_line(monkeypatch, "--help")
    print("a \u00fc", flush=True)
    assert stream.buffer.getvalue().endswith(b"a \\xfc\n")


def test_without_jsonargparse(monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    monkeypatch.delitem(sys.modules, "lightning_trak.cli.commands")
    with pytest.raises(
        ModuleNotFoundError, match=r'needs jsonargparse; install it with pip install "lightning-trak\[cli\]"'
    ):
        import lightning_trak.cli.commands  # noqa: F401
