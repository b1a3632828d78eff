"""What the files of a feature store must hold. What is read is compared with this."""

from typing import Any

from lightning_trak.features.dtypes import NAMES
from lightning_trak.features.engines import ENGINES
from lightning_trak.storage import schemas
from lightning_trak.storage.manifests import DirectoryKind

FORMAT_VERSION = 9
_MAX_SIZE = 1 << 40


def _sample(field: str, value: Any) -> None:
    if value is not None:
        schemas.items(schemas.sha256, least=1)(field, value)


_PARTS = schemas.items(schemas.record({"num_examples": schemas.integer(1, _MAX_SIZE), "sample": _sample}), least=1)


def _data(field: str, value: Any) -> None:
    _PARTS(field, value)
    for number, part in enumerate(value[1:]):
        if part["num_examples"] <= value[number]["num_examples"]:
            raise ValueError(f"{field}[{number + 1}].num_examples must be greater than that before it")


_SEALED = schemas.sealed(
    {
        "format": schemas.integer(FORMAT_VERSION, FORMAT_VERSION),
        "shard_size": schemas.integer(1, _MAX_SIZE),
        "data": _data,
        "identity": schemas.record(
            {"dtype": schemas.one_of(*NAMES)},
            optional={"parameters": schemas.parameters},
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
    growing=("data",),
    files=(
        r"engine-[0-9a-f]{16}\.json",
        r"examples\.safetensors",
        r"checkpoint-[^/]{1,16}/(shard-\d{5,}|context|projection|residuals)\.safetensors",
        r"checkpoint-[^/]{1,16}/(gram-(gauss_newton|identity)|kernel(-\d{5,})?)\.safetensors",
    ),
    readers="readers.lock",
)
HEADER = {
    "sha256": schemas.sha256,
    "checksum": schemas.sha256,
    "checkpoint": schemas.text(),
    "name": schemas.text(),
    "key": schemas.text(),
}
SHARD_HEADER = {
    "engine": schemas.text(),
    "dtype": schemas.one_of(*NAMES),
    "k": schemas.integer(1, _MAX_SIZE),
    "skipped": schemas.items(schemas.integer(0, _MAX_SIZE)),
}
ENGINE = schemas.record(
    {
        "engine": schemas.one_of(*ENGINES),
        "refuted": schemas.record({}, optional=dict.fromkeys(ENGINES, schemas.text())),
    }
)
