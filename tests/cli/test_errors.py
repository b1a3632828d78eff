"""What the command line says about wrong arguments: one line, status 2, and the likely spelling."""

import sys
from importlib.util import find_spec

import pytest
import torch
import yaml

from lightning_trak.cli.commands import main
from lightning_trak.cli.errors import is_user_error, join_numbers

FILE = {
    "model": "examples.digits.LitDigits",
    "data": "examples.digits_data.DigitsData",
    "trainer": {"logger": False, "enable_checkpointing": False},
}


@pytest.fixture
def error(tmp_path, monkeypatch, capsys):
    """Runs a command with sections of a file; gives the one line that it must print."""
    monkeypatch.chdir(tmp_path)

    def error(*arguments, **sections):
        (tmp_path / "config.yaml").write_text(yaml.dump(FILE | sections))
        monkeypatch.setattr(sys, "argv", ["lightning-trak", *arguments])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return error


@pytest.fixture
def refused(error):
    """As ``error``, for what the parser refuses; gives the line without the program."""

    def refused(*arguments, **sections):
        program, _, said = error(*arguments, **sections).partition(": error: ")
        assert said.endswith(f" (see {program} --help)")
        return said

    return refused


def method(**arguments):
    return {"method": {"class_path": "lightning_trak.TRAK", "init_args": arguments}}


WITH_FILE = ["score", "--config", "config.yaml"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "sections", "expected"),
    [
        (
            ["scor"],
            {},
            "no subcommand 'scor', expected fit, featurize, score, evaluate, show, clean; did you mean 'score'?",
        ),
        (["score", "--data.batch_size", "3", "--config", "c.yaml"], {}, "'batch_size' is given before its class"),
        (["score", "--topk", "3"], {}, "no option '--topk'; did you mean '--top_k'?"),
        (["score", "--train", "3"], {}, "no option '--train'; did you mean '--trainer'?"),
        (
            ["score", "--method", "lightning_trak.TRAKCallback"],
            {},
            "'lightning_trak.TRAKCallback' is no subclass of Feature",
        ),
        (["score", "--top_k", "three"], {}, "top_k: expected int or None, got three"),
        (["score", "--config", "none.yaml"], {}, "File does not exist: "),
        (["score", "--method", "TRACK"], {}, "there is no class 'TRACK'; expected a class or its import path; did you"),
        (["score", "--method.damping", "high"], {}, "method.damping: expected float or 'auto', got high"),
        (
            ["score", "--model", "examples.digits_data.DigitsData"],
            {},
            "model: the class does not correspond to a subclass",
        ),
        (["evaluate"], {}, "evaluate needs --ground_truth"),
        (WITH_FILE, {"modle": {"class_path": "a.B"}}, "no key 'modle.class_path'; did you mean 'model'?"),
        (WITH_FILE, {"trainer": {"max_epoch": 1}}, "no key 'trainer.max_epoch'; did you mean 'trainer.max_epochs'?"),
        (
            WITH_FILE,
            {"model": "examples.digits.LitDigit"},
            "no 'LitDigit' in examples.digits; did you mean 'LitDigits'",
        ),
        (WITH_FILE, {"model": "exmples.digits.LitDigits"}, "no module 'exmples'; did you mean 'examples'?"),
        (WITH_FILE, method(model="x"), "lightning_trak.TRAK has no argument 'model' (see"),
        (WITH_FILE, method(stor="x"), "lightning_trak.TRAK has no argument 'stor'; did you mean 'store'?"),
        (
            WITH_FILE,
            method(projection={"class_path": "lightning_trak.projections.SparseProjection", "init_args": {"dimm": 2}}),
            "lightning_trak.projections.SparseProjection has no argument 'dimm'; did you mean 'dim'?",
        ),
    ],
)
def test_wrong_arguments(refused, arguments, sections, expected):
    assert expected in refused(*arguments, **sections)


@pytest.mark.slow
def test_a_configuration_in_another_encoding(refused, tmp_path):
    (tmp_path / "other.yaml").write_text("model: é", encoding="utf-16")
    assert "a configuration file is not a text in UTF-8" in refused("score", "--config", "other.yaml")


@pytest.mark.slow
@pytest.mark.parametrize(("content", "said"), [("", "got an empty file"), ("model", "got model"), ("- a", "got - a")])
def test_a_file_without_sections(refused, tmp_path, content, said):
    (tmp_path / "other.yaml").write_text(content)
    line = refused("score", "--config", "other.yaml")
    assert line.startswith("a configuration has sections, such as model: and data:, with settings in them; " + said)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method.projection", "SparseProjection", "--method.projection.dim", "0"], "`dim` to be a positive integer"),
        (["--data.batch_size", "0", "--method.checkpoints", "[a.pt]"], "batch_size should be a positive integer value"),
        (["--method.checkpoints", "[a.pt]", "--scores", "."], '"." is a directory, and a file of scores would take'),
        (["--seed_everything", "-1"], "-1 is not in bounds"),
        (["--trainer.accelerator", "quantum"], "selected an invalid accelerator name: `accelerator='quantum'`"),
        pytest.param(
            ["--trainer.logger", "CometLogger"],
            "Requirement 'comet-ml",
            marks=pytest.mark.skipif(find_spec("comet_ml") is not None, reason="the package is there"),
        ),
    ],
)
def test_what_classes_and_commands_refuse_is_one_line(error, arguments, said):
    torch.save({}, "a.pt")
    assert said in error(*WITH_FILE, *arguments)


@pytest.mark.slow
def test_a_section_that_is_null(error):
    for section in ("model", "data", "method"):
        said = f"score needs `{section}`: give a class with --{section}"
        assert said in error(*WITH_FILE, **({"method": method(checkpoints=["a.pt"])["method"]} | {section: None}))


def test_several_numbers_are_one_list():
    assert join_numbers(["show", "--targets", "0", "1", "--k", "2"], "--targets") == [
        *("show", "--targets", "[0, 1]", "--k", "2")
    ]
    assert join_numbers(["--targets", "7"], "--targets") == ["--targets", "[7]"]
    assert join_numbers(["--targets", "[0, 5]", "--k", "2"], "--targets") == ["--targets", "[0, 5]", "--k", "2"]
    assert join_numbers(["--k", "2", "--targets"], "--targets") == ["--k", "2", "--targets"]


def test_only_refusals_of_the_package_and_missing_files_are_user_errors():
    def caught(run):
        with pytest.raises(Exception) as raised:  # noqa: PT011
            run()
        return raised.value

    assert is_user_error(caught(lambda: open("no/such/file")))  # noqa: SIM115
    assert not is_user_error(caught(lambda: int("x")))
    assert not is_user_error(caught(lambda: join_numbers(None, "--targets")))  # a bug in a frame of the package
