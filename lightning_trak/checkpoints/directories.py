"""Directories that other programs fill: Lightning's ModelCheckpoint, and the Trainer of Hugging Face or accelerate."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from torch import Tensor
from typing_extensions import override

from lightning_trak.checkpoints.base import Checkpoint, CheckpointFormat
from lightning_trak.checkpoints.formats import load_torch, read_weights, state_dict
from lightning_trak.storage.files import tensor_digest
from lightning_trak.storage.locations import Location, locate
from lightning_trak.storage.manifests import MANIFEST
from lightning_trak.storage.schemas import anything, parse_json, record, text
from lightning_trak.texts.messages import listed

_STEP = re.compile(r"checkpoint[-_](\d+)")  # of Hugging Face and of accelerate
_LIST = "pass a list of the paths that you mean, in their order"
# The names of transformers, in the order in which it looks for them.
_SAFETENSORS, _TORCH = "model.safetensors", "pytorch_model.bin"
_MODELS = (_SAFETENSORS, f"{_SAFETENSORS}.index.json", _TORCH, f"{_TORCH}.index.json")
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")  # of PEFT
_ADAPTER_SETTINGS = "adapter_config.json"
_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")

# File names without a path, so that an index cannot name a file elsewhere.
_index = record(
    {"weight_map": record({}, others=text(r"[^/\\]+", "the name of a file in this directory"))}, others=anything
)


class CheckpointDirectory(CheckpointFormat):
    """A directory of checkpoints that is not one of :class:`~lightning_trak.TRAKCallback`.

    It is one of these:

    - the ``dirpath`` of a ModelCheckpoint: its ``.ckpt`` files in the order of their steps. A file such as
      ``last.ckpt`` with the weights of another one does not count;
    - an output directory of the Trainer of Hugging Face, or of accelerate: its folders ``checkpoint-500``,
      ``checkpoint-1000``, ... in the order of their numbers;
    - one such folder, or any other to which ``save_pretrained`` wrote a model: ``model.safetensors`` or
      ``pytorch_model.bin``, each also in several parts with an index; or the weights of an adapter of PEFT alone,
      ``adapter_model.safetensors`` or ``adapter_model.bin``.
    """

    @classmethod
    @override
    def recognizes(cls, location: str) -> bool:
        filesystem, path, _ = locate(location)
        return bool(filesystem.isdir(path)) and MANIFEST not in _Directory.read(location).names

    @classmethod
    @override
    def find(cls, location: str, weights_only: bool) -> list[Checkpoint]:
        found = _Directory.read(location)
        steps = found.steps()
        kinds: dict[str, tuple[list[str], Callable[[], list[Checkpoint]]]] = {
            "of ModelCheckpoint": (found.ending(".ckpt"), partial(_lightning, found, weights_only)),
            "of Hugging Face": (steps, lambda: [_model(found.inside(name), weights_only) for name in steps]),
            "a saved model": (found.models(), lambda: [_model(found, weights_only)]),
        }
        present = {kind: names for kind, (names, _) in kinds.items() if names}
        if "of ModelCheckpoint" in present:
            others = [name for name in found.ending(*_WEIGHTS) if name not in found.models()]
            present |= {"of another kind": others} if others else {}
        if len(present) > 1:
            firsts = " and ".join(f'"{names[0]}" ({kind})' for kind, names in present.items())
            raise ValueError(f'"{location}" holds checkpoints of several kinds, {firsts}: {_LIST}')
        if not present:
            raise ValueError(_nothing(found))
        (kind,) = present
        return kinds[kind][1]()


class _Directory(NamedTuple):
    """A directory and the names in it.

    Attributes:
        location: of the directory.
        names: of files and folders, sorted.
    """

    location: Location
    names: list[str]

    @classmethod
    def read(cls, location: str) -> _Directory:
        found = locate(location)
        entries = found.filesystem.ls(found.path, detail=False)
        return cls(found, sorted(PurePosixPath(str(entry)).name for entry in entries))

    def inside(self, name: str) -> _Directory:
        return _Directory.read(self.location.inside(name).name)

    def is_directory(self, name: str) -> bool:
        return bool(self.location.filesystem.isdir(self.location.inside(name).path))

    def ending(self, *suffixes: str) -> list[str]:
        """Names of entries that have one of these suffixes and are not hidden."""
        return [name for name in self.names if PurePosixPath(name).suffix in suffixes and not name.startswith(".")]

    def steps(self) -> list[str]:
        """Names of the folders of single steps, in the order of their numbers."""
        found = [(int(match[1]), name) for name in self.names if (match := _STEP.fullmatch(name))]
        return [name for _, name in sorted(found) if self.is_directory(name)]

    def models(self) -> list[str]:
        """Names of the files of one saved model, the one to read first."""
        return [name for name in (*_MODELS, *_ADAPTERS) if name in self.names]

    def held(self) -> str:
        """What it holds, for messages."""
        if not self.names:
            return "it is empty"
        return f"it holds {listed(self.names, most=5)}"


def _nothing(found: _Directory) -> str:
    """Why a directory holds no checkpoints that can be read."""
    if ".metadata" in found.names or any(name.endswith(".distcp") for name in found.names):
        return (
            f'"{found.location}" is one checkpoint that is split over files by torch.distributed: make one file of it'
            f" with `python -m lightning.pytorch.utilities.consolidate_checkpoint {found.location}`"
        )
    if "zero_to_fp32.py" in found.names:  # DeepSpeed copies it to each checkpoint
        return (
            f'"{found.location}" is one checkpoint that DeepSpeed has split over files: in this directory, make whole'
            " weights of it with `python zero_to_fp32.py . ../weights`, and pass what that has written"
        )
    likely = next((name for name in ("checkpoints", "snapshots") if name in found.names), None)
    hint = f'did you mean "{found.location.inside(likely)}"?' if likely else _LIST
    return (
        f'"{found.location}" holds no checkpoints: expected the snapshots of a TRAKCallback ({MANIFEST}), .ckpt files,'
        f" folders checkpoint-500 and so on, or {_SAFETENSORS} or {_TORCH}, but {found.held()}; {hint}"
    )


# --- Lightning ----------------------------------------------------------------------------------------------------


class _Saved(NamedTuple):
    """A file of Lightning, and when in training it was saved."""

    step: int
    epoch: int
    is_last: bool
    name: str
    read: Callable[[], dict[str, Tensor]]


def _lightning(found: _Directory, weights_only: bool) -> list[Checkpoint]:
    """The ``.ckpt`` files of a directory, in the order of their steps, each step once.

    Raises:
        ValueError: if a file does not say its step, or two files of one step have other weights.
    """
    saved = sorted((_saved(found, name, weights_only) for name in found.ending(".ckpt")), key=lambda file: file[:4])
    kept: list[_Saved] = []
    for file in saved:
        same = kept[-1] if kept and kept[-1].step == file.step else None
        if same is None:
            kept.append(file)
        elif tensor_digest(same.read()) != tensor_digest(file.read()):
            raise ValueError(
                f'"{same.name}" and "{file.name}" in "{found.location}" are both of step {file.step}, with other'
                f" weights, so they are of several runs: {_LIST}"
            )
    folder = PurePosixPath(found.location.path).name
    return [Checkpoint(f"{folder}/{file.name}", file.read) for file in kept]


def _saved(found: _Directory, name: str, weights_only: bool) -> _Saved:
    if found.is_directory(name):
        raise ValueError(_nothing(found.inside(name)))
    file = found.location.inside(name)
    content = load_torch(file, weights_only)
    step, epoch = (content.get(key) if isinstance(content, Mapping) else None for key in ("global_step", "epoch"))
    if type(step) is not int or type(epoch) is not int:
        raise ValueError(f'"{file}" does not say its epoch and global_step as Lightning\'s files do: {_LIST}')
    return _Saved(step, epoch, name.startswith("last"), name, partial(read_weights, file, weights_only))


# --- Hugging Face -------------------------------------------------------------------------------------------------


def _model(found: _Directory, weights_only: bool) -> Checkpoint:
    """The model that was saved in a directory.

    Raises:
        ValueError: if there is none, or several.
        FileNotFoundError: if a part of it is missing.
    """
    if not found.models():
        raise ValueError(_nothing(found))
    several = [name for name in found.names if re.fullmatch(r"(model|pytorch_model)_\d+\.(safetensors|bin)", name)]
    if several:
        raise ValueError(f'"{found.location}" holds several models, such as {several[0]}: {_LIST}')
    name = found.models()[0]
    read = partial(read_weights, found.location.inside(name), weights_only)
    if name.endswith(".json"):
        _parts(found, name)  # raises now if a part is missing
        read = partial(_read_parts, found, name, weights_only)
    adapter = _adapter_settings(found) if name in _ADAPTERS else None
    return Checkpoint(f"{PurePosixPath(found.location.path).name}/{name}", read, adapter=adapter)


def _adapter_settings(found: _Directory) -> dict[str, Any]:
    filesystem, path, location = found.location.inside(_ADAPTER_SETTINGS)
    if _ADAPTER_SETTINGS not in found.names:
        raise FileNotFoundError(f'"{location}", the settings of the adapter, is missing; copy the whole directory')
    try:
        settings: dict[str, Any] = parse_json(filesystem.cat_file(path), record({}, others=anything))
    except ValueError as error:
        raise ValueError(f'"{location}" does not hold the settings of an adapter: {error}; save it again') from error
    return settings


def _parts(found: _Directory, index: str) -> dict[str, list[str]]:
    """The names of the tensors in each part of a model, as its index says."""
    filesystem, path, location = found.location.inside(index)
    try:
        weight_map: dict[str, str] = parse_json(filesystem.cat_file(path), _index)["weight_map"]
    except ValueError as error:
        raise ValueError(f'"{location}" is not the index of a model in parts: {error}; save the model again') from error
    parts: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        parts.setdefault(file, []).append(name)
    missing = sorted(set(parts) - set(found.names))
    if missing:
        raise FileNotFoundError(
            f'"{found.location}" lacks {len(missing)} of the {len(parts)} parts in {index}, the first is'
            f' "{missing[0]}"; copy the whole directory'
        )
    return parts


def _read_parts(found: _Directory, index: str, weights_only: bool) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for file, names in _parts(found, index).items():
        tensors = read_weights(found.location.inside(file), weights_only)
        lost = [name for name in names if name not in tensors]
        if lost:
            raise ValueError(
                f'"{found.location}/{file}" lacks {lost[0]}, which {index} places there: files of several models were'
                " mixed; save the model again"
            )
        weights |= {name: tensors[name] for name in names}
    return state_dict(weights, f'"{found.location}"')
