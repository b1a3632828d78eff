"""What the files of a feature store must hold. What is read is compared with this."""

from typing import Any

from lightning_trak.features.dtypes import NAMES
from lightning_trak.storage import schemas
from lightning_trak.storage.claims import DirectoryKind

FORMAT_VERSION = 4
_MAX_SIZE = 1 << 40

_SEALED = schemas.sealed(
    {
        "format": schemas.integer(FORMAT_VERSION, FORMAT_VERSION),
        "num_examples": schemas.integer(1, _MAX_SIZE),
        "shard_size": schemas.integer(1, _MAX_SIZE),
        "identity": schemas.record(
            {"checkpoints": schemas.items(schemas.anything, least=1)},
            optional={
                "dtype": schemas.one_of(*NAMES),
                "parameters": schemas.parameters,
            },
            others=schemas.anything,
        ),
    }
)


def _manifest(field: str, value: Any) -> None:
    _SEALED(field, value)  # a named function, so that objects with a store can be pickled


KIND = DirectoryKind(
    name="feature store",
    short_name="store",
    version=FORMAT_VERSION,
    schema=_manifest,
    advice="call featurize first",
    folders=("checkpoint-*",),
    results="checkpoint-*/shard-*",
    results_name="shards",
    settled=("shard_size",),
)
HEADER = {
    "sha256": schemas.sha256,
    "checksum": schemas.sha256,
    "checkpoint": schemas.integer(0, _MAX_SIZE),
    "name": schemas.text(),
    "key": schemas.text(),
}
SHARD_HEADER = {
    "engine": schemas.text(),
    "dtype": schemas.one_of(*NAMES),
    "k": schemas.integer(1, _MAX_SIZE),
    "rounding_error": schemas.number(0, 1e3),
}
ENGINES = ("hooks", "functional", "loop")
ENGINE = schemas.record(
    {
        "engine": schemas.one_of(*ENGINES),
        "refuted": schemas.record({}, optional=dict.fromkeys(ENGINES, schemas.text())),
    }
)
