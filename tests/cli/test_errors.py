"""What the command line says about wrong arguments: one line, status 2, and the likely spelling."""

import sys

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
def refused(tmp_path, monkeypatch, capsys):
    """Runs a command with sections of a file; gives the one line that it must print, without the program."""
    monkeypatch.chdir(tmp_path)

    def refused(*arguments, **sections):
        (tmp_path / "config.yaml").write_text(yaml.dump(FILE | sections))
        monkeypatch.setattr(sys, "argv", ["lightning-trak", *arguments])
        monkeypatch.setattr(sys, "path", list(sys.path))
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        program, _, said = line.partition(": error: ")
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
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method.projection", "SparseProjection", "--method.projection.dim", "0"], "`dim` to be a positive integer"),
        (["--data.batch_size", "0", "--method.checkpoints", "[a.pt]"], "batch_size should be a positive integer value"),
        (["--method.checkpoints", "[a.pt]", "--scores", "."], '"." is a directory, and a file of scores would take'),
    ],
)
def test_what_classes_and_commands_refuse_is_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    torch.save({}, "a.pt")
    monkeypatch.setattr(sys, "argv", ["lightning-trak", "score", "--config", "config.yaml", *arguments])
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "config.yaml").write_text(yaml.dump(FILE))
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


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
