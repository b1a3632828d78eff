"""kill -9 at random moments of featurizing and scoring."""

import os

import pytest

from tests.launch import run_module

pytestmark = pytest.mark.slow


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the harness forks")
def test_a_killed_run_continues_to_the_same_bits(tmp_path):
    run_module("tests.end_to_end.kill_harness", str(tmp_path))
    assert "identical" in run_module("tests.end_to_end.kill_harness", str(tmp_path), "20230328")
