"""The examples on text, at a size at which they still find something."""

import gzip
import random
import re
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import default_collate

pytest.importorskip("transformers")

from examples import entailment, language_model, text_pairs
from examples.texts import interval, learn_tokenizer


def measured(printed, name):
    """Value and interval on the line that begins with a name."""
    (found,) = re.findall(rf"^ +{re.escape(name)} +(?:LDS )?(\S+) +\(95% interval (\S+) to ([^,)]+)", printed, re.M)
    value, low, high = map(float, found)
    assert low <= value <= high
    return value, low, high


def test_interval_is_a_bootstrap_of_the_mean():
    values = torch.randn(40, generator=torch.Generator().manual_seed(0)) + 1
    mean, low, high = interval(values)
    assert mean == pytest.approx(float(values.mean()))
    expected = stats.bootstrap((values.numpy(),), np.mean, method="percentile", rng=0).confidence_interval
    assert [low, high] == pytest.approx(expected, abs=0.03)


def test_tokenizer_loses_nothing_and_tells_pairs_apart():
    text = "Where was Ada born?\n    Ada, née Byron: in London.\n"
    tokenizer = learn_tokenizer([text], vocab_size=300)
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    ids = tokenizer("Ada", "born")["input_ids"]
    assert tokenizer.convert_ids_to_tokens([ids[0], ids[-1]]) == ["[CLS]", "[SEP]"]
    assert ids.count(tokenizer.sep_token_id) == 2


@pytest.mark.parametrize(("suffix", "opener"), [("tsv", open), ("tsv.gz", gzip.open)])
def test_pairs_from_a_table(tmp_path, suffix, opener):
    with opener(tmp_path / f"dev.{suffix}", "wt", encoding="utf-8") as file:
        file.write('index\tquestion\tsentence\tlabel\n0\tWho?\tHe said "so.\tnot_entailment\n1\tA\tB\tentailment\n')
    assert entailment.read(tmp_path, "dev", 9) == [("Who?", 'He said "so.', 0), ("A", "B", 1)]
    assert entailment.read(tmp_path, "dev", 1) == [("Who?", 'He said "so.', 0)]
    (tmp_path / f"dev.{suffix}").rename(tmp_path / f"test.{suffix}")
    with pytest.raises(SystemExit, match=re.escape("no dev.tsv or dev.tsv.gz")):
        entailment.read(tmp_path, "dev", 1)


def test_generated_pairs_are_what_their_labels_say():
    kinds = [
        (question.format(a=name), sentence.format(a=name, b=place), int(asked is told))
        for asked in entailment.RELATIONS
        for told in entailment.RELATIONS
        for question in asked[0]
        for sentence in told[1]
        for name in entailment.PEOPLE
        for place in entailment.PLACES
    ]
    drawn = entailment.generate(200, seed=3)
    assert set(drawn) <= set(kinds)
    assert sum(label for *_, label in drawn) == 100


def test_text_pairs(tmp_path, capsys):
    sizes = ["--train", "120", "--targets", "12", "--epochs", "4", "--runs", "1", "--subsets", "3"]
    text_pairs.main([*sizes, "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for name in ("TRAK", "TRAK, one model", "TracIn", "BM25, label's sign"):
        measured(printed, name)
    assert measured(printed, "TRAK") == measured(printed, "TRAK, one model")  # there is one only
    assert 0 <= float(re.search(r"retraining is noisy: (\S+)", printed)[1]) <= 1
    shares = [int(share) for share in re.findall(r"of every target, (\d+)% have the target's label", printed)]
    assert shares[0] > 80
    assert shares[1] < 20
    assert printed.count("target ") == 3
    assert len(re.findall(r"positive [-+]", printed)) == len(re.findall(r"negative [-+]", printed)) == 12


def small_model():
    torch.manual_seed(0)
    ids = torch.randint(3, 20, (6, 8))
    model = language_model.LitCausalLM(language_model.small_gpt2(20, 8, width=32), lr=1e-3)
    return model, [{"input_ids": row, "labels": row} for row in ids]


def test_a_tail_patch_is_a_step_on_a_copy():
    model, examples = small_model()
    optimizer = model.configure_optimizers()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    rise = language_model.tail_patch(model, optimizer, examples[:2], examples[0])
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())
    assert rise > language_model.tail_patch(model, optimizer, examples[4:], examples[0])
    loss = model.network(**default_collate(examples[:1])).loss.item()
    model.network(**default_collate(examples[:2])).loss.backward()
    optimizer.step()
    assert rise == pytest.approx(loss - model.network(**default_collate(examples[:1])).loss.item(), abs=1e-5)


def test_continuations_keep_the_prompt_and_are_labelled_alone():
    model, examples = small_model()
    prompts = torch.stack([example["input_ids"][:3] for example in examples])
    for prompt, target in zip(prompts, language_model.generate(model, prompts, 8), strict=True):
        assert target["input_ids"].shape == (8,)
        assert torch.equal(target["input_ids"][:3], prompt)
        assert target["labels"].tolist() == [-100] * 3 + target["input_ids"][3:].tolist()


def test_language_model(tmp_path, capsys):
    with gzip.open(tmp_path / "text.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(topics[name] for name in sorted(topics)[:25]))
    sizes = ["--train", "200", "--targets", "12", "--length", "32", "--epochs", "4", "--vocabulary", "500"]
    language_model.main([*sizes, "--data", str(tmp_path / "text.gz"), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for name in ("GradientCosine", "BM25", "random"):
        assert measured(printed, "TRAK")[0] - measured(printed, name)[0] == pytest.approx(
            measured(printed, f"TRAK - {name}")[0], abs=0.02
        )
    assert measured(printed, "TRAK - random")[1] > 0, printed
    assert printed.count("continuation  ") == 2
    with pytest.raises(SystemExit, match="passages only"):
        language_model.main(["--train", "100000", "--data", str(tmp_path / "text.gz"), "--out", str(tmp_path)])


def test_lora_examples_read_as_they_should():
    peft_lora = pytest.importorskip("peft") and pytest.importorskip("examples.peft_lora")
    tokens = list(peft_lora.VOCABULARY)
    for task, right in (("reverse", True), ("sort", True), ("copy", False)):
        item = peft_lora.instruction(random.Random(0), task, right)
        text = [tokens[i] for i, kept in zip(item["input_ids"], item["attention_mask"], strict=True) if kept]
        letters, phrase, answer = text[:4], text[5:-5], text[-4:]
        assert text[4] == ":"
        assert text[-5] == "="
        assert " ".join(phrase) in peft_lora.SKILLS[task][1]
        skills = {name for name, (skill, _) in peft_lora.SKILLS.items() if list(skill(letters)) == answer}
        assert (task in skills) == right
        assert skills
        asked = item["labels"] != -100
        assert [tokens[i] for i in item["labels"][asked]] == answer
        assert torch.equal(item["labels"][asked], item["input_ids"][asked])


def test_peft_lora(tmp_path, capsys):
    pytest.importorskip("peft")
    from examples import peft_lora

    sizes = ["--tasks", "reverse", "last", "--base", "12800", "--pool", "120", "--targets", "8", "--top", "10"]
    sizes += ["--epochs", "6", "--seeds", "1"]
    peft_lora.main([*sizes, "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    rows = re.findall(r"^   (\w+) +([\d.]+)((?: +[\d.]+ \( *\d+%\)){4})$", printed, re.M)
    assert [task for task, *_ in rows] == ["reverse", "last"], printed
    shares = torch.tensor([[int(share) for share in re.findall(r"(\d+)%", row)] for *_, row in rows]).float().mean(0)
    assert shares[0] > 2 * shares[3], "TRAK must select far more of the right kind than chance"
    assert measured(printed, "random")[0] < 0, "tuning on TRAK's selection must help more than on a random one"
