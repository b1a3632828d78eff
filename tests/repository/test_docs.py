"""The code of the pages runs, from top to bottom, and what the pages name exists."""

import pkgutil
import re
import shutil
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from examples.counterfactuals import DigitsMLP
from examples.digits import make_data as make_digits
from lightning_trak import TRAK, TRAKCallback, outputs
from lightning_trak.checkpoints.series import ParameterGroup, SnapshotSeries
from tests.launch import ROOT
from tests.lit import TARGETS, TRAIN, LitNet, make_model, make_trainer

pytestmark = pytest.mark.slow

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
LANDING = DOCS / "index.md"
QUICKSTART = DOCS / "quickstart.md"
EVALUATION = DOCS / "evaluation.md"
HUGGING_FACE = DOCS / "guides" / "hugging_face.md"
GUIDES = [DOCS / "comparison.md", *sorted(set((DOCS / "guides").glob("*.md")) - {HUGGING_FACE})]
NAMED = re.compile(r"(?<![\w./])lightning_trak(?:\.\w+)+")
BLOCK = re.compile(r"(<!-- not run -->\n)?^( *)```python\n(.*?)^\2```", re.MULTILINE | re.DOTALL)


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the guides take for granted, and the files that they read."""
    monkeypatch.chdir(tmp_path)
    group = ParameterGroup(0, "SGD", 0.1, 0.0, tuple(name for name, _ in LitNet().named_parameters()))
    for seed, run in enumerate(("run", "run1", "run2")):
        series = SnapshotSeries(f"{run}/snapshots")
        series.open()
        series.save(make_model(seed).state_dict(), 1, 1, [group])
    torch.save({"state_dict": make_model(3).state_dict()}, "a.ckpt")
    save_file(make_model(4).state_dict(), "b.safetensors")
    return {
        "__name__": "guide",
        "L": L,
        "LitNet": LitNet,
        "GPT": GPT,
        "make_trainer": lambda: make_trainer(max_epochs=1),
        "model": make_model(),
        "trainer": make_trainer(),
        "train": TRAIN,
        "train_loader": DataLoader(TRAIN, batch_size=10),
        "targets": TARGETS,
        "target_loader": DataLoader(TARGETS, batch_size=10),
        "checkpoints": [make_model(seed).state_dict() for seed in (5, 6)],
        "k": 16,
    }


def run(page, names):
    text = page.read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for marked, indent, code in BLOCK.findall(text):
            code = re.sub(f"^{indent}", "", code, flags=re.MULTILINE)
            compiled = compile(code, f"{page.name}: {code.splitlines()[0]}", "exec")
            if not marked:
                exec(compiled, names)


def test_the_evaluation_runs(tmp_path, monkeypatch):
    """On fewer digits and subsets than the page has."""
    monkeypatch.chdir(tmp_path)
    train, targets = (TensorDataset(*data[:size]) for data, size in zip(make_digits(), (100, 3), strict=True))
    train_loader = DataLoader(train, batch_size=25)
    trainer = make_trainer(max_epochs=1, callbacks=[TRAKCallback("run/snapshots")])
    model = DigitsMLP()
    trainer.fit(model, train_loader)
    trak = TRAK(model, "run/snapshots", "run/features")
    trak.featurize(trainer, train_loader)
    names = {
        "__name__": "evaluation",
        "L": L,
        "LitNet": DigitsMLP,
        "TRAK": TRAK,
        "TRAKCallback": TRAKCallback,
        "TensorBoardLogger": TensorBoardLogger,
        "labels": train.tensors[1],
        "make_trainer": lambda: make_trainer(max_epochs=1),
        "model": model,
        "train": train,
        "train_loader": train_loader,
        "trainer": trainer,
        "trak": trak,
        "targets": targets,
    }
    text = EVALUATION.read_text()
    assert "num_subsets=100" in text
    smaller = tmp_path / "evaluation.md"
    smaller.write_text(text.replace("num_subsets=100", "num_subsets=4"))
    run(smaller, names)
    assert len(names["suspicion"]) == len(train)
    assert -1 <= float(names["lds"].compute()) <= 1


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_guides_run(page, names):
    run(page, names)


def test_the_landing_page_runs(names):
    shutil.rmtree("run")  # the page trains
    run(LANDING, names)
    assert names["scores"].shape == (len(TARGETS), len(TRAIN))


def test_the_hugging_face_guide_runs(tmp_path, monkeypatch, as_it_was):
    transformers, tokenizers = (pytest.importorskip(name) for name in ("transformers", "tokenizers"))
    for name in ("accelerate", "peft"):
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    words = {"[PAD]": 0} | {f"w{number}": number for number in range(1, 30)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[PAD]"))
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    texts = [torch.randint(1, 30, (length,)).tolist() for length in (3, 7, 4, 6, 5, 3, 8, 4, 5, 6, 7, 3)]
    data = [{"input_ids": text, "attention_mask": [1] * len(text)} for text in texts]
    names = {
        "__name__": "guide",
        "network": transformers.LlamaForCausalLM(config),
        "tokenizer": transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]"),
        "train": data[:8],
        "validation": data[8:],
    }
    run(HUGGING_FACE, names)
    assert names["top"].indices.shape == (4, 3)
    assert names["scores"].shape == (2, 8)
    assert len(names["chosen"]) == 1


def test_every_output_has_a_task_and_a_line_of_code_that_runs():
    page = (DOCS / "guides" / "tasks.md").read_text()
    code = "".join(block for *_, block in BLOCK.findall(page))
    for name in set(outputs.__all__) - {"AttributionMixin", "ModelOutput"}:
        assert f"{name}(" in code
    for name in re.findall(r"^\|[^|]+\| \[`(\w+)\(", page, re.MULTILINE):
        assert f"{name}(" in code


def test_the_quickstart_is_a_script(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(QUICKSTART, {"__name__": "__main__"})
    shown = capsys.readouterr().out
    assert shown.count("from training example") == 10
    numbers = re.search(r"LDS (-?[0-9.]+), 95% interval (-?[0-9.]+) to (-?[0-9.]+)", shown).groups()
    value, low, high = map(float, numbers)
    assert 0 < low < value < high  # better than chance
    run(QUICKSTART, {"__name__": "__main__"})  # once more, as it is
    assert capsys.readouterr().out.count("from training example") == 10
    assert len(list((tmp_path / "run/features").glob("checkpoint-*"))) == 2


def test_blocks_are_found():
    pages = [page.read_text() for page in (LANDING, QUICKSTART, EVALUATION, HUGGING_FACE, *GUIDES)]
    blocks = [block for page in pages for block in BLOCK.findall(page)]
    assert len(blocks) == sum(page.count("```python") for page in pages)
    assert len([marked for marked, *_ in blocks if marked]) == 3  # those that need eight devices, or litdata


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS.parent).as_posix())
def test_pages_name_what_exists(page):
    for name in set(NAMED.findall(page.read_text())):
        pkgutil.resolve_name(name)


def test_names_are_found():
    names = [name for page in PAGES for name in NAMED.findall(page.read_text())]
    assert "lightning_trak.reporting.loggers" in names
    with pytest.raises(AttributeError, match="no_such_module"):
        pkgutil.resolve_name("lightning_trak.no_such_module")
