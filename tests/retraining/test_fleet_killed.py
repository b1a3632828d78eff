"""kill -9 at random moments of a fleet, trained one by one and together."""

import os

import pytest

from tests.launch import run_module

pytestmark = pytest.mark.slow


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the harness forks")
def test_a_killed_fleet_continues_to_the_same_bits(tmp_path):
    assert "identical" in run_module("tests.retraining.fleet_harness", str(tmp_path), "20230328")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the harness forks")
def test_a_killed_fleet_of_a_recorded_run_continues_to_the_same_bits(tmp_path):
    assert "identical" in run_module("tests.retraining.recorded_harness", str(tmp_path))
