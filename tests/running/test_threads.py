import os

import pytest

from tests.launch import run_module


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the harness forks")
def test_threads_of_a_forked_process_compute_at_once():
    run_module("tests.running.fork_harness")
