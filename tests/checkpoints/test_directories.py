"""Directories that Lightning's ModelCheckpoint and the Trainer of Hugging Face have written."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path

import fsspec
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_trak.checkpoints.reading import resolve_checkpoints
from tests.lit import TRAIN, LitNet, make_trainer
from tests.snapshot_data import assert_equal

A, B, C = ({"weight": torch.full((2,), float(value)), "bias": torch.zeros(1)} for value in (1, 2, 3))


def save(path: Path, weights: dict[str, Tensor], step: int, epoch: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": weights, "global_step": step, "epoch": epoch}, path)


def names(location: str | Path) -> list[str]:
    return [checkpoint.name for checkpoint in resolve_checkpoints(location)]


# --- ModelCheckpoint ----------------------------------------------------------------------------------------------


def fit(callback: ModelCheckpoint) -> None:
    trainer = make_trainer(max_epochs=12, callbacks=[callback], enable_checkpointing=True)
    trainer.fit(LitNet(), DataLoader(TRAIN, batch_size=25))


def test_what_model_checkpoint_writes_is_read_in_the_order_of_steps(tmp_path: Path) -> None:
    fit(ModelCheckpoint(tmp_path, save_top_k=-1, every_n_epochs=4, save_last=True))
    expected = [f"epoch={epoch}-step={2 * epoch + 2}.ckpt" for epoch in (3, 7, 11)]
    assert sorted(os.listdir(tmp_path)) == sorted([*expected, "last.ckpt"])
    assert names(tmp_path) == [f"{tmp_path.name}/{name}" for name in expected]  # 11 after 3; last.ckpt is the third
    for name, checkpoint in zip(expected, resolve_checkpoints(tmp_path), strict=True):
        assert_equal(checkpoint.load(), torch.load(tmp_path / name)["state_dict"])


def test_a_link_to_the_last_one_does_not_count(tmp_path: Path) -> None:
    fit(ModelCheckpoint(tmp_path, save_top_k=-1, every_n_epochs=6, save_last="link"))
    assert (tmp_path / "last.ckpt").is_symlink()
    assert len(names(tmp_path)) == 2


def test_a_last_one_of_its_own_counts(tmp_path: Path) -> None:
    """With the best one kept alone, last.ckpt is of a later step."""
    save(tmp_path / "val_loss=0.10.ckpt", A, 10)
    save(tmp_path / "last.ckpt", B, 30)
    assert names(tmp_path) == [f"{tmp_path.name}/val_loss=0.10.ckpt", f"{tmp_path.name}/last.ckpt"]


def test_names_of_metrics_say_nothing_of_the_order(tmp_path: Path) -> None:
    for name, weights, step in (("loss=0.1", A, 200), ("loss=0.2", B, 1000), ("loss=0.3", C, 30)):
        save(tmp_path / f"{name}.ckpt", weights, step)
    assert [name.rpartition("/")[2] for name in names(tmp_path)] == ["loss=0.3.ckpt", "loss=0.1.ckpt", "loss=0.2.ckpt"]


def test_files_of_one_step_count_once_if_they_are_the_same(tmp_path: Path) -> None:
    for name in ("last.ckpt", "epoch=0-step=10.ckpt", "epoch=0-step=10-v1.ckpt"):
        save(tmp_path / name, A, 10)
    assert names(tmp_path) == [f"{tmp_path.name}/epoch=0-step=10-v1.ckpt"]


def test_two_runs_in_one_directory_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "epoch=0-step=10.ckpt", A, 10)
    save(tmp_path / "epoch=0-step=10-v1.ckpt", B, 10)
    with pytest.raises(
        ValueError, match=r'"epoch=0-step=10-v1\.ckpt" and "epoch.*of step 10, with other weights.*list'
    ):
        resolve_checkpoints(tmp_path)


def test_files_on_another_file_system(tmp_path: Path) -> None:
    save(tmp_path / "b.ckpt", A, 10)
    save(tmp_path / "a.ckpt", B, 20)
    save_file(C, tmp_path / "model.safetensors")
    remote = f"memory://{uuid.uuid4().hex}"
    memory = fsspec.filesystem("memory")
    for file in ("a.ckpt", "b.ckpt"):
        memory.put(str(tmp_path / file), f"{remote}/run/{file}")
    memory.put(str(tmp_path / "model.safetensors"), f"{remote}/out/checkpoint-5/model.safetensors")
    assert names(f"{remote}/run") == ["run/b.ckpt", "run/a.ckpt"]
    (saved,) = resolve_checkpoints(f"{remote}/out/")
    assert_equal(saved.load(), C)


def test_a_file_that_does_not_say_its_step_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": A}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r'a\.ckpt" does not say its epoch and global_step.*pass a list'):
        resolve_checkpoints(tmp_path)
    torch.save(A, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="does not say its epoch"):
        resolve_checkpoints(tmp_path)


def test_a_sharded_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "epoch=0-step=1.ckpt").mkdir()
    (tmp_path / "epoch=0-step=1.ckpt" / ".metadata").write_bytes(b"")
    with pytest.raises(ValueError, match=r"split over files.*consolidate_checkpoint .*step=1\.ckpt"):
        resolve_checkpoints(tmp_path)
    with pytest.raises(ValueError, match="consolidate_checkpoint"):
        resolve_checkpoints(tmp_path / "epoch=0-step=1.ckpt")


def test_a_checkpoint_of_deepspeed_is_refused(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt" / "checkpoint").mkdir(parents=True)
    (tmp_path / "last.ckpt" / "zero_to_fp32.py").write_text("")
    for directory in (tmp_path, tmp_path / "last.ckpt"):
        with pytest.raises(
            ValueError, match=r"last\.ckpt\" is one checkpoint that DeepSpeed has split .* zero_to_fp32\.py"
        ):
            resolve_checkpoints(directory)


def test_code_in_a_file_runs_only_on_the_users_word(tmp_path: Path) -> None:
    content = {"state_dict": A, "global_step": 1, "epoch": 0, "hyper_parameters": L.Trainer}
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="weights_only=False"):
        resolve_checkpoints(tmp_path)
    assert_equal(resolve_checkpoints(tmp_path, weights_only=False)[0].load(), A)


# --- Hugging Face -------------------------------------------------------------------------------------------------


def save_steps(folder: Path, **steps: dict[str, Tensor]) -> None:
    for name, weights in steps.items():
        path = folder / name.replace("_", "-")
        path.mkdir(parents=True)
        save_file(weights, path / "model.safetensors", {"format": "pt"})
        for other in ("optimizer.pt", "training_args.bin", "rng_state.pth", "trainer_state.json", "config.json"):
            (path / other).write_bytes(b"not a model")


def test_folders_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    save_steps(tmp_path, checkpoint_1000=A, checkpoint_500=B, checkpoint_90=C)
    (tmp_path / "tmp-checkpoint-2000").mkdir()  # was not finished
    (tmp_path / "runs").mkdir()
    found = resolve_checkpoints(tmp_path)
    assert [checkpoint.name for checkpoint in found] == [
        f"checkpoint-{step}/model.safetensors" for step in (90, 500, 1000)
    ]
    for checkpoint, weights in zip(found, (C, B, A), strict=True):
        assert_equal(checkpoint.load(), weights)
    assert names(tmp_path / "checkpoint-500") == ["checkpoint-500/model.safetensors"]
    assert len(names([tmp_path / "checkpoint-500", tmp_path / "checkpoint-90"])) == 2  # type: ignore[arg-type]


def test_folders_of_accelerate(tmp_path: Path) -> None:
    for number, weights in ((10, A), (9, B)):
        (tmp_path / f"checkpoint_{number}").mkdir()
        torch.save(weights, tmp_path / f"checkpoint_{number}" / "pytorch_model.bin")
    first, second = resolve_checkpoints(tmp_path)
    assert_equal(first.load(), B)
    assert_equal(second.load(), A)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_model_in_parts(tmp_path: Path, kind: str) -> None:
    stem, write = ("model", save_file) if kind == "safetensors" else ("pytorch_model", torch.save)
    files = [f"{stem}-0000{part}-of-00002.{kind}" for part in (1, 2)]
    write({"weight": A["weight"]}, tmp_path / files[0])
    write({"bias": A["bias"]}, tmp_path / files[1])
    index = {"metadata": {"total_size": 12}, "weight_map": {"weight": files[0], "bias": files[1]}}
    path = tmp_path / f"{stem}.{kind}.index.json"
    path.write_text(json.dumps(index))
    (found,) = resolve_checkpoints(tmp_path)
    assert_equal(found.load(), A)
    assert found.fingerprint() == resolve_checkpoints(A)[0].fingerprint()

    (tmp_path / files[1]).rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f'lacks 1 of the 2 parts in {path.name}, the first is "{files[1]}"'):
        resolve_checkpoints(tmp_path)
    write({"other": A["bias"]}, tmp_path / files[1])
    with pytest.raises(ValueError, match=r"lacks bias, which .*index\.json places there"):
        resolve_checkpoints(tmp_path)[0].load()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{}", "lacks the field 'weight_map'"),
        (b"[]", "must be an object"),
        (b'{"weight_map": {"weight": "../secret.safetensors"}}', "name of a file in this directory"),
        (b'{"weight_map": {"weight": 3}}', "name of a file in this directory"),
        (b"\xff", "can't decode"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"is not the index of a model in parts: .*{reason}"):
        resolve_checkpoints(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    save_steps(tmp_path, checkpoint_500=A)
    (tmp_path / "checkpoint-1000").mkdir()
    with pytest.raises(ValueError, match=r"checkpoint-1000\" holds no checkpoints: .* it is empty"):
        resolve_checkpoints(tmp_path)


def test_an_adapter_comes_with_its_settings(tmp_path: Path) -> None:
    save_file(A, tmp_path / "adapter_model.safetensors")
    with pytest.raises(FileNotFoundError, match=r'adapter_config.json", the settings of the adapter, is missing'):
        resolve_checkpoints(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"r": 2}')
    (found,) = resolve_checkpoints(tmp_path)
    assert found.partial
    assert found.adapter == {"r": 2}
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="does not hold the settings of an adapter"):
        resolve_checkpoints(tmp_path)


def test_several_models_of_accelerate_are_refused(tmp_path: Path) -> None:
    save_file(A, tmp_path / "model.safetensors")
    save_file(A, tmp_path / "model_1.safetensors")
    with pytest.raises(ValueError, match=r"holds several models, such as model_1\.safetensors"):
        resolve_checkpoints(tmp_path)


# --- other directories --------------------------------------------------------------------------------------------


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no checkpoints: expected .*TRAKCallback.*, but it is empty"):
        resolve_checkpoints(tmp_path)


def test_the_parent_of_checkpoints_is_refused_with_their_name(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints" / "a.ckpt", A, 1)
    (tmp_path / "hparams.yaml").write_text("{}")
    with pytest.raises(ValueError, match=r'it holds checkpoints, hparams.yaml; did you mean ".*/checkpoints"\?'):
        resolve_checkpoints(tmp_path)


@pytest.mark.parametrize("other", ["model.safetensors", "pytorch_model.bin", "final.pt", "some.safetensors"])
def test_several_kinds_are_refused(tmp_path: Path, other: str) -> None:
    save(tmp_path / "a.ckpt", A, 1)
    save_file(A, tmp_path / other)
    with pytest.raises(ValueError, match=rf'several kinds, "a\.ckpt" .*"{other}".*pass a list'):
        resolve_checkpoints(tmp_path)


def test_a_model_beside_folders_of_steps_is_refused(tmp_path: Path) -> None:
    save_steps(tmp_path, checkpoint_500=A)
    save_file(B, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r'several kinds, "checkpoint-500" .*"model\.safetensors" \(a saved model\)'):
        resolve_checkpoints(tmp_path)
