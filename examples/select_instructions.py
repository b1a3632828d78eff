"""Which 5% of a pool of instructions should a language model be tuned on? By LESS (Xia et al. 2024, arXiv 2402.04333).

A few examples of a target capability are given, in groups (LESS calls them subtasks). Adapters are tuned on a random 5%
of the pool for a few epochs, with a snapshot after each. At each snapshot, the gradient of an instruction, divided by
the root of Adam's second moments, is compared with the gradients of the given examples by the cosine. Snapshots are
weighed by their learning rates. An instruction's score is its mean over a group, for the group that it suits best. New
adapters are then tuned on the 5% with the highest scores, and on as many by other selections. What counts is the loss
on new examples of the groups.

By default, a small GPT-2 has learned six skills, under short names and in everyday words, but not well. The pool asks
for them in everyday words, and a third of its answers are wrong. With --data and --pretrained the example uses your
model and your instructions: a folder of pool.jsonl and targets.jsonl (or .jsonl.gz), with rows
{"instruction": ..., "response": ..., "task": ...}. The tasks of targets.jsonl are the groups. The first --targets of
each are the given examples, the others the new ones.
"""

import argparse
import copy
import json
import random
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    logging,
    set_seed,
)

from examples.common import begin, make_trainer, read_rows
from examples.peft_lora import learn_skills, make_loader
from examples.skills import SKILLS, Row, instruction, named
from lightning_trak import GradientCosine
from lightning_trak.callbacks.hugging_face import TRAKTrainerCallback
from lightning_trak.methods import BM25, RandomScores
from lightning_trak.metrics.functional import bootstrap_interval
from lightning_trak.outputs import NegativeLoss


def response_losses(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The mean loss of the tokens of each response, as Hugging Face computes it for one example."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits, labels = module(**inputs).logits[:, :-1], batch["labels"][:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return losses.sum(1) / (labels != -100).sum(1)


def tune(
    base: nn.Module, data: DataLoader, args: argparse.Namespace, seed: int, *callbacks: TrainerCallback
) -> nn.Module:
    """A copy of the base model with new LoRA adapters, tuned by the Trainer of Hugging Face."""
    set_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(base), config)
    arguments = TrainingArguments(
        str(args.out),  # where nothing is saved
        num_train_epochs=args.warmup if callbacks else args.epochs,
        learning_rate=args.lr,
        lr_scheduler_type="constant",
        per_device_train_batch_size=8,
        seed=seed,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
    )
    trainer = Trainer(model, arguments, data.collate_fn, train_dataset=data.dataset, callbacks=list(callbacks))
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model.eval()


def loss(model: nn.Module, loader: DataLoader) -> float:
    with torch.no_grad():
        return float(torch.cat([response_losses(model, batch) for batch in loader]).mean())


def select(
    run: Path, model: nn.Module, pool: DataLoader, given: DataLoader, groups: list[str], seed: int
) -> dict[str, Tensor]:
    """The score of each instruction of the pool by each method: its mean over a group, for its best group."""
    options: dict[str, Any] = {
        "output": NegativeLoss(response_losses), "parameters": "*lora*", "learning_rates": "snapshots",
    }  # fmt: skip
    methods = {
        "LESS": GradientCosine(model, run / "snapshots", run / "adam", preconditioned=True, **options),
        "without Adam": GradientCosine(model, run / "snapshots", run / "plain", **options),
    }
    found, trainer = {}, make_trainer(1)
    for name, method in methods.items():
        method.featurize(trainer, pool)
        found[name] = method.score(trainer, given, groups=groups, aggregate="mean").amax(0)
    labels = sorted(set(groups))
    for name, other in {"BM25": BM25("input_ids"), "random": RandomScores(seed)}.items():
        scores = other.attribute(trainer, pool, given)
        means = [scores[[label == group for label in groups]].mean(0) for group in labels]
        found[name] = torch.stack(means).amax(0)
    return found


def split(rows: list[Row], count: int) -> tuple[list[Row], list[Row]]:
    """The first rows of each task, which are given, and the others, which are new."""
    tasks = {task: [row for row in rows if row["task"] == task] for task in dict.fromkeys(row["task"] for row in rows)}
    for task, found in tasks.items():
        if len(found) <= count:
            raise SystemExit(f'task "{task}" has {len(found)} targets, not more than --targets {count}')
    return [row for found in tasks.values() for row in found[:count]], [
        row for found in tasks.values() for row in found[count:]
    ]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of pool.jsonl and targets.jsonl (or .jsonl.gz)")
    parser.add_argument("--pretrained", help="name or folder of the causal language model to tune on --data")
    parser.add_argument("--out", type=Path, default=Path("demo_output/select_instructions"), help="where all is saved")
    parser.add_argument("--tasks", nargs="+", default=["reverse", "last"], help="without --data: the groups")
    parser.add_argument("--base", type=int, default=32000, help="examples that the small GPT-2 learns from")
    parser.add_argument("--pool", type=int, default=1000, help="instructions to select from, without --data")
    parser.add_argument("--targets", type=int, default=10, help="given examples of each group")
    parser.add_argument("--share", type=float, default=0.05, help="share of the pool to select, and to warm up on")
    parser.add_argument("--warmup", type=int, default=4, help="epochs of the warm-up, with a snapshot after each")
    parser.add_argument("--epochs", type=int, default=4, help="epochs of tuning on a selection")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of the adapters")
    parser.add_argument("--repetitions", type=int, default=3, help="pools (or warm-ups) and tunings, for the interval")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    args = parser.parse_args(argv)
    if (args.data is None) != (args.pretrained is None):
        parser.error("--data and --pretrained belong together: give both, or neither")
    if args.quick:
        args.base, args.pool, args.epochs, args.warmup, args.repetitions = 320, 200, 1, 2, 1
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    run = begin(args.out)
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*|.*fan_in_fan_out.*")  # from PEFT itself
    set_seed(0)
    draw = random.Random(0)
    if args.data is None:
        print(f"1. Training a base model on {args.base} examples of {len(SKILLS)} skills", flush=True)
        skills = list(SKILLS)
        rows = [instruction(draw, draw.choice(skills)) if i % 2 else named(draw) for i in range(args.base)]
        base, tokenizer = learn_skills(rows)
    else:
        print(f"1. Reading {args.pretrained}", flush=True)
        base, tokenizer = (kind.from_pretrained(args.pretrained) for kind in (AutoModelForCausalLM, AutoTokenizer))
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    losses: dict[str, list[float]] = {"LESS": [], "without Adam": [], "BM25": [], "random": [], "not tuned": []}
    for repetition in range(args.repetitions):
        if args.data is None:
            pool = [instruction(draw, draw.choice(skills), wrong=1 / 3) for _ in range(args.pool)]
            rows = [instruction(draw, task) for task in args.tasks for _ in range(args.targets + 200)]
        else:
            pool, rows = (read_rows(args.data, name) for name in ("pool", "targets"))
        given, new = split(rows, args.targets)
        groups, count, folder = [row["task"] for row in given], round(args.share * len(pool)), run / str(repetition)
        print(f"2. Selecting {count} of {len(pool)} instructions, repetition {repetition}", flush=True)
        warmup = make_loader(random.Random(repetition).sample(pool, count), tokenizer)
        keep = TRAKTrainerCallback(folder / "snapshots", trainable_only=True, preconditioner=True)
        model = tune(base, warmup, args, repetition, keep)
        loaders = [make_loader(part, tokenizer, batch_size=64) for part in (pool, given)]
        new_loader = make_loader(new, tokenizer, batch_size=200)
        losses["not tuned"].append(loss(base.eval(), new_loader))
        for name, scores in select(folder, model, *loaders, groups, repetition).items():
            best = [(index, float(scores[index])) for index in scores.topk(count).indices.tolist()]
            lines = [json.dumps({"index": index, "score": score, **pool[index]}) for index, score in best]
            (folder / f"{name.replace(' ', '-')}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            chosen = [pool[index] for index, _ in best]
            losses[name].append(loss(tune(base, make_loader(chosen, tokenizer), args, repetition), new_loader))
            share = sum(row.get("task") in groups and row.get("right", True) for row in chosen) / count
            print(f"   {name:13s} {share:4.0%} are of the groups and right; loss {losses[name][-1]:.3f}", flush=True)

    print(f"3. Loss on new examples after tuning on {args.share:.0%}, mean of {args.repetitions} repetitions")
    table = torch.tensor(list(losses.values()))
    for name, values, more in zip(losses, table, table - table[0], strict=True):
        low, high = (float(end) for end in bootstrap_interval(more))
        lead = f"   {more.mean():+.3f} beside LESS (95% interval {low:+.3f} to {high:+.3f})" if name != "LESS" else ""
        print(f"   {name:13s} {values.mean():.3f}{lead}")
    print(f'   The selected instructions, with their positions in the pool: "{folder}"')


if __name__ == "__main__":
    main()
