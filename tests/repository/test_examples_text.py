"""The examples on text at a tiny size: what they print belongs together; and that their data are what they say."""

import gzip
import json
import random
import re
from importlib import import_module
from pydoc_data.topics import topics

import pytest
import torch

pytest.importorskip("transformers")

from transformers import BertConfig, BertForMaskedLM

from examples import entailment, language_model, skills, text_pairs
from examples.texts import learn_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("as_it_was")]


def measured(printed, name):
    """Value and interval on the line that begins with a name."""
    (found,) = re.findall(rf"^ +{re.escape(name)} +(?:LDS )?(\S+) +\(95% interval (\S+) to ([^,)]+)", printed, re.M)
    value, low, high = map(float, found)
    assert low <= value <= high
    return value, low, high


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


def check_text_pairs(printed, targets):
    for name in ("TRAK", "TRAK, one model", "TracIn", "BM25, label's sign"):
        value, low, high = measured(printed, name)
        assert -1 <= low <= value <= high <= 1
    assert measured(printed, "TRAK") == measured(printed, "TRAK, one model")  # there is one only
    for share in re.findall(r"(\d+)% (?:have the target's label|of the held-out pairs correctly)", printed):
        assert 0 <= int(share) <= 100
    assert printed.count("target ") == min(3, targets)
    highest, lowest = (
        [float(score) for score in re.findall(rf"^   {kind} (\S+) ", printed, re.M)]
        for kind in ("positive", "negative")
    )
    assert len(highest) == len(lowest) == 4 * min(3, targets)
    for start in range(0, len(highest), 4):
        assert highest[start : start + 4] == sorted(highest[start : start + 4], reverse=True)
        assert lowest[start : start + 4] == sorted(lowest[start : start + 4])
        assert highest[start + 3] >= lowest[start + 3]


def test_text_pairs(tmp_path, capsys):
    sizes = ["--train", "40", "--targets", "6", "--epochs", "2", "--runs", "1", "--subsets", "3"]
    text_pairs.main([*sizes, "--out", str(tmp_path)])
    check_text_pairs(capsys.readouterr().out, 6)


def test_text_pairs_with_a_pretrained_encoder(tmp_path, capsys):
    """As `save_pretrained` leaves it: with dropout, another head, and a tokenizer that knows no longest text."""
    pairs = entailment.generate(40, seed=0)
    tokenizer = learn_tokenizer([text for pair in pairs for text in pair[:2]], vocab_size=300)
    tokenizer.model_max_length = int(1e30)
    tokenizer.save_pretrained(tmp_path / "bert")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=24, **sizes)
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    (tmp_path / "data").mkdir()
    lines = [
        f"{number}\t{first}\t{second * 5}\t{entailment.LABELS[label]}"
        for number, (first, second, label) in enumerate(pairs)
    ]
    for name, part in (("train", lines[:30]), ("dev", lines[30:])):
        (tmp_path / f"data/{name}.tsv").write_text("\n".join(["index\tquestion\tsentence\tlabel", *part]))
    sizes = ["--train", "30", "--targets", "4", "--epochs", "1", "--runs", "1", "--subsets", "4"]
    paths = ["--pretrained", str(tmp_path / "bert"), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    text_pairs.main([*sizes, *paths])
    check_text_pairs(capsys.readouterr().out, 4)
    assert all(part.training for part in text_pairs.LitPairs(str(tmp_path / "bert"), 0, 1e-3).modules())


def small_model():
    torch.manual_seed(0)
    ids = torch.randint(3, 20, (6, 8))
    model = language_model.LitCausalLM(language_model.small_gpt2(20, 8), lr=1e-3)
    return model, [{"input_ids": row, "labels": row} for row in ids]


def test_continuations_keep_the_prompt_and_are_labelled_alone():
    model, examples = small_model()
    prompts = torch.stack([example["input_ids"][:3] for example in examples])
    for prompt, target in zip(prompts, language_model.generate(model, prompts, 8), strict=True):
        assert target["input_ids"].shape == (8,)
        assert torch.equal(target["input_ids"][:3], prompt)
        assert target["labels"].tolist() == [-100] * 3 + target["input_ids"][3:].tolist()


def table(printed):
    """The cells of a printed Markdown table, by the first of their row."""
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    return {name: cells for name, *cells in rows}


def test_language_model(tmp_path, capsys):
    with gzip.open(tmp_path / "text.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(topics[name] for name in sorted(topics)[:10]))
    sizes = ["--train", "60", "--targets", "6", "--length", "16", "--epochs", "2", "--vocabulary", "400", "--top", "4"]
    language_model.main([*sizes, "--data", str(tmp_path / "text.gz"), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    found = table(printed)
    numbers = {
        name: [float(number) for number in re.findall(r"[-+]\d[\d.e-]*", cell)] for name, (cell, *_) in found.items()
    }
    for name in ("TRAK", "GradientCosine", "BM25", "random"):
        mean, low, high = numbers[name]
        assert low <= mean <= high
        if name != "TRAK":
            lead = float(found[name][1].split()[0])
            assert lead == pytest.approx(numbers["TRAK"][0] - mean, abs=2e-3)
    assert printed.count("continuation  ") == 2
    assert len(re.findall(r"^The continuation: what passage \d+ explains$", printed, re.M)) == 2
    (page,) = tmp_path.rglob("tokens.html")
    shown = re.findall(r'title="token (\d+): ([-+]\S+)"', page.read_text())
    tokens, scores = [int(token) for token, _ in shown], [float(score) for _, score in shown]
    assert tokens == 2 * [*range(4, 16), *range(1, 16)]  # without the prompt; without the first token
    for start in (0, 27):  # both ends sum to one score
        one, other = scores[start : start + 12], scores[start + 12 : start + 27]
        assert sum(one) == pytest.approx(sum(other), abs=0.01 * sum(map(abs, one + other)))
    with pytest.raises(SystemExit, match="passages only"):
        language_model.main(["--train", "100000", "--data", str(tmp_path / "text.gz"), "--out", str(tmp_path)])


def skilful(task, letters):
    return " ".join(skills.SKILLS[task][0](letters.split()))


def test_instructions_are_as_they_say():
    draw = random.Random(0)
    for task, wrong in (("reverse", 0.0), ("sort", 0.0), ("copy", 1.0)):
        row = skills.instruction(draw, task, wrong)
        phrase, letters = row["instruction"].split(": ")
        assert phrase in skills.SKILLS[task][1]
        assert row["task"] == task
        assert row["right"] == (wrong == 0)
        answers = {skilful(skill, letters) for skill in skills.SKILLS if (skill == task) == row["right"]}
        assert row["response"] in answers
    row = skills.named(draw)
    phrase, letters = row["instruction"].split(": ")
    assert row["task"].upper() in phrase.split()
    assert row["response"] == skilful(row["task"], letters)
    kinds = [skills.instruction(draw, "last", wrong=1 / 3)["right"] for _ in range(900)]
    assert 500 < sum(kinds) < 700


def test_the_response_alone_is_labelled():
    peft_lora = pytest.importorskip("peft") and import_module("examples.peft_lora")
    rows = [{"instruction": "Say it twice: é", "response": "é é"}, {"instruction": "Hush.", "response": "."}]
    tokenizer = learn_tokenizer([row["instruction"] for row in rows], vocab_size=300)
    (batch,) = peft_lora.make_loader(rows, tokenizer, batch_size=2)
    columns = (batch[name] for name in ("input_ids", "labels", "attention_mask"))
    for row, ids, labels, attended in zip(rows, *columns, strict=True):
        text = f"{row['instruction']}\nAnswer: {row['response']}[SEP]"
        assert tokenizer.decode(ids[attended == 1]) == text
        assert tokenizer.decode(labels[labels != -100]) == f" {row['response']}[SEP]"
        assert torch.equal(labels[labels != -100], ids[labels != -100])
    tokenizer.model_max_length = 5
    assert [len(values) for values in peft_lora.encode(rows[0], tokenizer).values()] == [5, 5, 5]


def check_selection(printed, tasks):
    rows = re.findall(r"^   (\w+) +([\d.]+)((?: +[\d.]+ \( *\d+%, *\d+%\)){4})$", printed, re.M)
    assert [task for task, *_ in rows] == tasks, printed
    cells = [re.findall(r"([\d.]+) \( *(\d+)%, *(\d+)%\)", row) for *_, row in rows]
    assert all(int(right) + int(wrong) <= 100 for row in cells for _, right, wrong in row)
    losses = torch.tensor([[float(loss) for loss, *_ in row] for row in cells]).mean(0)
    for column, name in enumerate(("GradientCosine", "BM25", "random"), 1):
        assert measured(printed, name)[0] == pytest.approx(float(losses[0] - losses[column]), abs=0.02)


def test_peft_lora(tmp_path, capsys):
    peft_lora = pytest.importorskip("peft") and import_module("examples.peft_lora")
    sizes = ["--tasks", "reverse", "last", "--base", "640", "--pool", "30", "--targets", "2", "--top", "4"]
    peft_lora.main([*sizes, "--epochs", "2", "--seeds", "1", "--out", str(tmp_path)])
    check_selection(capsys.readouterr().out, ["reverse", "last"])


def test_peft_lora_on_ones_own_instructions(tmp_path, capsys):
    peft_lora = pytest.importorskip("peft") and import_module("examples.peft_lora")
    draw, folder = random.Random(0), tmp_path / "data"
    pool = [skills.instruction(draw, task) for task in ("sort", "copy") for _ in range(8)]
    pool = [{name: row[name] for name in ("instruction", "response", "task")} for row in pool]
    del pool[0]["task"]
    targets = [skills.instruction(draw, task) for task in ("sort", "copy") for _ in range(4)]
    folder.mkdir()
    (folder / "pool.jsonl").write_text("\n".join(map(json.dumps, pool)))
    with gzip.open(folder / "targets.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, targets)))
    tokenizer = learn_tokenizer([row["instruction"] for row in pool], vocab_size=300)
    for part in (tokenizer, language_model.small_gpt2(len(tokenizer), 64)):
        part.save_pretrained(tmp_path / "gpt2")
    given = ["--data", str(folder), "--pretrained", str(tmp_path / "gpt2"), "--out", str(tmp_path / "out")]
    sizes = ["--top", "5", "--epochs", "1", "--seeds", "1"]
    peft_lora.main([*given, *sizes, "--targets", "3"])
    check_selection(capsys.readouterr().out, ["sort", "copy"])
    with pytest.raises(SystemExit, match='task "sort" has 4 targets, not more than --targets 4'):
        peft_lora.main([*given, *sizes, "--targets", "4"])
    with pytest.raises(SystemExit):
        peft_lora.main(given[:2])
    assert "--data and --pretrained belong together" in capsys.readouterr().err


def check_instructions(printed, directory, count, repetitions=1):
    """What is printed belongs to what is written: positions in the pool, best first."""
    names = ["LESS", "without Adam", "BM25", "random"]
    rows = re.findall(
        r"^   (LESS|without Adam|BM25|random) +(\d+)% are of the groups and right; loss ([\d.]+)$", printed, re.M
    )
    assert [name for name, *_ in rows] == names * repetitions
    means = dict(re.findall(r"^   (\w+(?: \w+)?) +([\d.]+)(?: +[-+].*interval.*)?$", printed, re.M))
    for name in names:
        own = [float(loss) for found, _, loss in rows if found == name]
        assert float(means[name]) == pytest.approx(sum(own) / repetitions, abs=2e-3)
    for repetition in range(repetitions):
        for name in names:
            file = directory / str(repetition) / f"{name.replace(' ', '-')}.jsonl"
            chosen = [json.loads(line) for line in file.read_text().splitlines()]
            assert len({row["index"] for row in chosen}) == count
            scores = [row["score"] for row in chosen]
            assert scores == sorted(scores, reverse=True)
            right = sum(row["task"] in ("reverse", "last") and row.get("right", True) for row in chosen)
            assert int(rows[repetition * 4 + names.index(name)][1]) == round(100 * right / count)
    return chosen


def test_select_instructions(tmp_path, capsys):
    pytest.importorskip("peft")
    select_instructions = import_module("examples.select_instructions")
    select_instructions.main(["--quick", "--out", str(tmp_path)])
    (run,) = tmp_path.iterdir()
    check_instructions(capsys.readouterr().out, run, 10)


def test_select_from_ones_own_instructions(tmp_path, capsys):
    pytest.importorskip("peft")
    select_instructions = import_module("examples.select_instructions")
    draw, folder = random.Random(0), tmp_path / "data"
    pool = [skills.instruction(draw, task) for task in ("reverse", "last", "copy") for _ in range(10)]
    targets = [skills.instruction(draw, task) for task in ("last", "reverse") for _ in range(4)]
    folder.mkdir()
    (folder / "pool.jsonl").write_text("\n".join(map(json.dumps, pool)))
    (folder / "targets.jsonl").write_text("\n".join(map(json.dumps, targets)))
    tokenizer = learn_tokenizer([row["instruction"] for row in pool], vocab_size=300)
    for part in (tokenizer, language_model.small_gpt2(len(tokenizer), 64)):
        part.save_pretrained(tmp_path / "gpt2")
    given = ["--data", str(folder), "--pretrained", str(tmp_path / "gpt2"), "--out", str(tmp_path / "out")]
    select_instructions.main([*given, "--quick", "--targets", "3", "--share", "0.4"])
    (run,) = (tmp_path / "out").iterdir()
    for row in check_instructions(capsys.readouterr().out, run, 12):
        assert {**pool[row["index"]], "index": row["index"], "score": row["score"]} == row
    with pytest.raises(SystemExit, match='task "last" has 4 targets, not more than --targets 4'):
        select_instructions.main([*given, "--targets", "4"])
    with pytest.raises(SystemExit):
        select_instructions.main(given[:2])
    assert "--data and --pretrained belong together" in capsys.readouterr().err
