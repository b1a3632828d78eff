import logging
import uuid
import warnings
from pathlib import Path

import pytest
import torch

from tests.lit import attribute, make_checkpoints


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
