import uuid
from pathlib import Path

import pytest


@pytest.fixture(params=["local", "file", "memory"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    remote = f"memory://{uuid.uuid4().hex}/snapshots"
    return {"local": str(tmp_path / "run/snapshots"), "file": (tmp_path / "run").as_uri(), "memory": remote}[
        request.param
    ]
