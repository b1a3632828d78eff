import functools
import gc
import logging
import os
import random
import uuid
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.fabric.utilities import registry

from tests.lit import attribute, make_checkpoints

# Every module, fixture and test begins with seeded generators, so that what it draws is the same in every run, whatever
# ran before it. Modules and fixtures have seeds of their own: a test does not draw the numbers of its fixtures again.


def seed_generators(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)


def pytest_collectstart(collector: pytest.Collector) -> None:
    seed_generators(zlib.crc32(collector.nodeid.encode()))


def pytest_collection_finish() -> None:
    """Imported modules stay, so garbage collections need not look through them."""
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef) -> None:
    seed_generators(zlib.crc32(fixturedef.argname.encode()))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    seed_generators(0)


# Every new Trainer reads the metadata of all installed packages, to find callbacks of theirs. That takes longer than
# all else in making a Trainer, and what is installed stays the same here.
registry.entry_points = functools.cache(registry.entry_points)

# To flush a file protects it from a power cut, which no test makes, and takes longer than to write it. The descriptor
# is still checked, and other processes of the tests do flush.
os.fsync = os.fstat


@pytest.fixture(params=["local", "file", "memory"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    remote = f"memory://{uuid.uuid4().hex}/snapshots"
    return {"local": str(tmp_path / "run/snapshots"), "file": (tmp_path / "run").as_uri(), "memory": remote}[
        request.param
    ]


@pytest.fixture(scope="session")
def checkpoints():
    return make_checkpoints(2)


@pytest.fixture(scope="session")
def expected(checkpoints, tmp_path_factory):
    """Scores of TARGETS and TRAIN in one process, in order."""
    return attribute(tmp_path_factory.mktemp("expected"), checkpoints)


@pytest.fixture
def as_it_was():
    """Examples change settings of the process, which are restored."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "transformers")]
    levels, threads = [logger.level for logger in loggers], torch.get_num_threads()
    with warnings.catch_warnings():
        yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    torch.set_num_threads(threads)
