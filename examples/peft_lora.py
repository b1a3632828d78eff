"""Which instructions should a language model be tuned on, for one task?

LoRA adapters are tuned on a pool of instructions. For a few examples of each task, TRAK scores these instructions by
the gradients of the adapters alone. Two things are measured: how many of the selected instructions are of that task and
right, and the loss on new examples of the task after tuning on the selection. Both are compared with selections of the
same size by other methods and by chance.

By default, a small GPT-2 has learned some skills under short names. The pool asks for these skills in everyday words,
and a third of its answers are wrong. With --data and --pretrained the example uses your model and your instructions: a
folder of pool.jsonl and targets.jsonl (or .jsonl.gz), with rows {"instruction": ..., "response": ..., "task": ...}. The
selection is made for the first targets of each task; the other targets are the new examples. In the pool, tasks are
only counted.
"""

import argparse
import copy
import random
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from examples.common import begin, make_trainer, read_rows
from examples.language_model import LitCausalLM, small_gpt2
from examples.skills import SKILLS, Row, instruction, named
from examples.texts import learn_tokenizer
from lightning_trak import TRAK, GradientCosine, TRAKCallback
from lightning_trak.methods import BM25, RandomScores
from lightning_trak.metrics.functional import bootstrap_interval


def encode(row: Row, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Instruction and response as token ids. Only the tokens of the response have labels."""
    texts = f"{row['instruction']}\nAnswer:", f" {row['response']}{tokenizer.eos_token}"
    asked, answer = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
    ids, labels = asked + answer, [-100] * len(asked) + answer
    longest = tokenizer.model_max_length
    return {"input_ids": ids[:longest], "attention_mask": [1] * len(ids[:longest]), "labels": labels[:longest]}


def make_loader(rows: list[Row], tokenizer: PreTrainedTokenizerBase, **options: Any) -> DataLoader:
    examples = [encode(row, tokenizer) for row in rows]
    return DataLoader(examples, collate_fn=DataCollatorForSeq2Seq(tokenizer), **options)


def learn_skills(rows: list[Row]) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A small GPT-2 that has learned these rows, and its tokenizer."""
    tokenizer = learn_tokenizer((f"{row['instruction']}\nAnswer: {row['response']}" for row in rows), vocab_size=700)
    base = LitCausalLM(small_gpt2(len(tokenizer), length=32), lr=2e-3)
    make_trainer(1).fit(base, make_loader(rows, tokenizer, batch_size=64))
    return base.network, tokenizer


def with_adapters(base: nn.Module, lr: float) -> LitCausalLM:
    """A copy of the base model with new LoRA adapters. Only the adapters are trained."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return LitCausalLM(get_peft_model(copy.deepcopy(base), config), lr).train()


def loss(model: LitCausalLM, examples: DataLoader) -> float:
    model.eval()
    with torch.no_grad():
        return torch.stack([model.training_step(batch) for batch in examples]).mean().item()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of pool.jsonl and targets.jsonl (or .jsonl.gz)")
    parser.add_argument("--pretrained", help="name or folder of the causal language model to tune on --data")
    parser.add_argument("--out", type=Path, default=Path("demo_output/peft_lora"), help="where everything is written")
    parser.add_argument("--tasks", nargs="+", help="tasks to select instructions for; default: all")
    parser.add_argument("--base", type=int, default=64000, help="examples that the small GPT-2 learns from")
    parser.add_argument("--pool", type=int, default=600, help="instructions to select from, without --data")
    parser.add_argument("--targets", type=int, default=10, help="examples of a task that the selection is for")
    parser.add_argument("--top", type=int, default=40, help="instructions to select")
    parser.add_argument("--epochs", type=int, default=12, help="epochs of tuning on the pool")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate of the adapters")
    parser.add_argument("--seeds", type=int, default=2, help="tunings on each selection")
    args = parser.parse_args(argv)
    if (args.data is None) != (args.pretrained is None):
        parser.error("--data and --pretrained belong together: give both, or neither")
    run = begin(args.out)
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*|.*fan_in_fan_out.*")  # from PEFT itself
    L.seed_everything(0, verbose=False)
    draw = random.Random(0)

    if args.data is None:
        print(f"1. Training a base model on {args.base} examples of {len(SKILLS)} skills", flush=True)
        base, tokenizer = learn_skills([named(draw) for _ in range(args.base)])
        pool = [instruction(draw, draw.choice(list(SKILLS)), wrong=1 / 3) for _ in range(args.pool)]
        rows = [instruction(draw, task) for task in SKILLS for _ in range(args.targets + 200)]
    else:
        print(f"1. Reading {args.pretrained}", flush=True)
        base, tokenizer = (kind.from_pretrained(args.pretrained) for kind in (AutoModelForCausalLM, AutoTokenizer))
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        pool, rows = (read_rows(args.data, name) for name in ("pool", "targets"))
    tasks = args.tasks or [*dict.fromkeys(row["task"] for row in rows)]
    asked = {task: [row for row in rows if row["task"] == task] for task in tasks}
    for task, found in asked.items():
        if len(found) <= args.targets:
            raise SystemExit(f'task "{task}" has {len(found)} targets, not more than --targets {args.targets}')

    print(f"2. Tuning LoRA adapters on a pool of {len(pool)} instructions, with snapshots", flush=True)
    model = with_adapters(base, args.lr)
    trainer = make_trainer(args.epochs, TRAKCallback(run / "snapshots", every_n_epochs=max(1, args.epochs // 4)))
    loader = make_loader(pool, tokenizer, batch_size=16, shuffle=True)
    trainer.fit(model, loader)

    print(f"3. Attributing {args.targets} examples of each task to these instructions", flush=True)
    features = {"checkpoints": run / "snapshots", "store": run / "features", "parameters": "*lora*"}
    methods = {
        "TRAK": TRAK(model, **features),
        "GradientCosine": GradientCosine(model, **features),
        "BM25": BM25("input_ids"),
        "random": RandomScores(),
    }
    targets = make_loader([row for task in tasks for row in asked[task][: args.targets]], tokenizer, batch_size=16)
    selected = {}
    for name, method in methods.items():
        scores = method.attribute(trainer, loader, targets).view(len(tasks), args.targets, len(pool))
        selected[name] = scores.mean(1).topk(args.top).indices.tolist()

    print(f"4. Loss on new examples of a task, of adapters tuned on the {args.top} instructions selected")
    print("   (in brackets: the share that is of the task and rightly answered, or wrongly)")
    print(f"   {'task':8s}{'untuned':>8s}" + "".join(f"{name:>17s}" for name in methods))
    losses = torch.zeros(len(methods), len(tasks))
    for column, task in enumerate(tasks):
        new = make_loader(asked[task][args.targets :], tokenizer, batch_size=200)
        print(f"   {task:8s}{loss(LitCausalLM(base, args.lr), new):8.2f}", end="")
        for row, name in enumerate(methods):
            chosen = [pool[index] for index in selected[name][column]]
            for seed in range(args.seeds):
                torch.manual_seed(seed)
                tuned = with_adapters(base, args.lr)
                make_trainer(args.epochs * 2).fit(tuned, make_loader(chosen, tokenizer, batch_size=16, shuffle=True))
                losses[row, column] += loss(tuned, new) / args.seeds
            answers = [one.get("right", True) for one in chosen if one.get("task") == task]
            right, wrong = (answers.count(kind) / len(chosen) for kind in (True, False))
            print(f"{losses[row, column]:5.2f} ({right:4.0%},{wrong:4.0%})", end="", flush=True)
        print()
    print("   Loss on the selection of TRAK minus that on the selection of")
    differences = losses[0] - losses
    for name, values, low, high in zip(methods, differences, *bootstrap_interval(differences), strict=True):
        if name != "TRAK":
            print(f"   {name:15s}{values.mean():+.2f}  (95% interval {low:+.2f} to {high:+.2f}, over tasks)")


if __name__ == "__main__":
    main()
