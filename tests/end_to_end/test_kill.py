"""kill -9 at random moments of featurizing and scoring."""

import os
import subprocess
import sys

import pytest

from tests.launch import ROOT

pytestmark = pytest.mark.slow


def run(harness: str, *arguments: str) -> str:
    """Run a harness; its output, or a failure that shows it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-m", harness, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the harness forks")
def test_a_killed_run_continues_to_the_same_bits(tmp_path):
    run("tests.end_to_end.kill_harness", str(tmp_path))
    assert "identical" in run("tests.end_to_end.kill_harness", str(tmp_path), "20230328")
