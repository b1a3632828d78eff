"""Which instructions should a language model be tuned on, for the sake of one task?

A small GPT-2 learns some skills under terse names. LoRA adapters then teach it the instructions by which people ask for
them, from a pool in which a third of the answers are wrong. TRAK scores the pool for a few examples of one task, by the
gradients of the adapters alone. Two checks: how many of the selected instructions are of that task and right,
and the loss on new examples of it after tuning on the selection, beside as many that BM25 or chance selects.
"""

import argparse
import copy
import random
import warnings
from pathlib import Path

import lightning as L
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader, default_collate
from transformers import GPT2LMHeadModel

from examples.common import begin, make_trainer
from examples.language_model import Example, LitCausalLM, small_gpt2
from examples.texts import interval
from lightning_trak import TRAK, GradientCosine, TRAKCallback
from lightning_trak.methods import BM25, RandomScores

SKILLS = {  # what becomes of the letters, and how people ask for it
    "copy": (lambda x: x, ["repeat these letters", "say the same again", "leave it all as it is"]),
    "reverse": (lambda x: x[::-1], ["write it backwards", "go from last to first", "turn the letters around"]),
    "sort": (sorted, ["put these in order", "arrange by the alphabet", "sort the letters for me"]),
    "rotate": (lambda x: x[1:] + x[:1], ["move the first to the end", "shift all to the left", "begin at the second"]),
    "first": (lambda x: x[:1] * len(x), ["only the first each time", "fill it with the start", "all like the first"]),
    "last": (lambda x: x[-1:] * len(x), ["only the last each time", "fill it with the end", "all like the last"]),
}
WORDS = sorted({word for _, phrases in SKILLS.values() for phrase in phrases for word in phrase.split()})
LETTERS = "ABCDEFGH"
VOCABULARY = {token: i for i, token in enumerate(["<pad>", ":", "=", *LETTERS, *map("<{}>".format, SKILLS), *WORDS])}
LETTERS_EACH, LENGTH = 4, 16


def example(draw: random.Random, phrase: list[str], skill: str) -> Example:
    """Such as ``A C A B : write it backwards = B A C A``, padded; the answer alone is labelled."""
    letters = draw.choices(LETTERS, k=LETTERS_EACH)
    tokens = [*letters, ":", *phrase, "=", *SKILLS[skill][0](letters)]
    ids = torch.tensor([VOCABULARY[token] for token in tokens] + [0] * (LENGTH - len(tokens)))
    place = torch.arange(LENGTH)
    labels = torch.where((place >= len(tokens) - LETTERS_EACH) & (place < len(tokens)), ids, -100)
    return {"input_ids": ids, "attention_mask": (place < len(tokens)).long(), "labels": labels}


def named(draw: random.Random) -> Example:
    """What the base model learns: a skill's name among words that mean nothing yet."""
    skill = draw.choice(list(SKILLS))
    phrase = [f"<{skill}>", *draw.choices(WORDS, k=draw.randrange(6))]
    draw.shuffle(phrase)
    return example(draw, phrase, skill)


def instruction(draw: random.Random, task: str, right: bool = True) -> Example:
    """A task in people's words, with its answer or that of another task."""
    skill = task if right else draw.choice([other for other in SKILLS if other != task])
    return example(draw, draw.choice(SKILLS[task][1]).split(), skill)


def with_adapters(base: GPT2LMHeadModel, lr: float) -> LitCausalLM:
    """A copy of the base model, of which only new LoRA adapters are trained."""
    layers = ["c_attn", "c_fc", "c_proj"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=layers, fan_in_fan_out=True, task_type="CAUSAL_LM")
    return LitCausalLM(get_peft_model(copy.deepcopy(base), config), lr).train()


def loss(model: LitCausalLM, examples: list[Example]) -> float:
    model.eval()
    with torch.no_grad():
        return model.training_step(default_collate(examples)).item()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo_output/peft_lora"), help="where everything is written")
    parser.add_argument("--tasks", nargs="+", choices=SKILLS, default=list(SKILLS), help="to select instructions for")
    parser.add_argument("--base", type=int, default=64000, help="examples that the base model learns from")
    parser.add_argument("--pool", type=int, default=600, help="instructions to select from")
    parser.add_argument("--targets", type=int, default=10, help="examples of a task that the selection is for")
    parser.add_argument("--top", type=int, default=40, help="instructions to select")
    parser.add_argument("--epochs", type=int, default=12, help="of tuning on the pool")
    parser.add_argument("--seeds", type=int, default=2, help="tunings on each selection")
    args = parser.parse_args(argv)
    run = begin(args.out)
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*")  # PEFT asks Transformers for it
    L.seed_everything(0, verbose=False)
    draw = random.Random(0)

    print(f"1. Training a base model on {args.base} examples of {len(SKILLS)} skills", flush=True)
    base = LitCausalLM(small_gpt2(len(VOCABULARY), LENGTH), lr=2e-3)
    make_trainer(1).fit(base, DataLoader([named(draw) for _ in range(args.base)], batch_size=64))
    print(f"   Loss on new examples {loss(base, [named(draw) for _ in range(500)]):.3f}")

    print(f"2. Tuning LoRA adapters on a pool of {args.pool} instructions, with snapshots", flush=True)
    kinds = [(draw.choice(list(SKILLS)), draw.random() < 2 / 3) for _ in range(args.pool)]
    pool = [instruction(draw, task, right) for task, right in kinds]
    model = with_adapters(base.network, lr=3e-3)
    trainer = make_trainer(args.epochs, TRAKCallback(run / "snapshots", every_n_epochs=max(1, args.epochs // 4)))
    loader = DataLoader(pool, batch_size=16, shuffle=True)
    trainer.fit(model, loader)

    print(f"3. Attributing {args.targets} examples of each task to these instructions", flush=True)
    features = {"checkpoints": run / "snapshots", "store": run / "features", "parameters": "*lora*"}
    methods = {
        "TRAK": TRAK(model, **features),
        "GradientCosine": GradientCosine(model, **features),
        "BM25": BM25(lambda item: item["input_ids"][item["attention_mask"] == 1]),
        "random": RandomScores(),
    }
    targets = DataLoader([instruction(draw, task) for task in args.tasks for _ in range(args.targets)], batch_size=16)
    selected = {}
    for name, method in methods.items():
        scores = method.attribute(trainer, loader, targets).view(len(args.tasks), args.targets, args.pool)
        selected[name] = scores.mean(1).topk(args.top).indices.tolist()

    print(f"4. New adapters tuned on the {args.top} instructions selected for a task: loss on new examples of it")
    print("   (in brackets: how many of the selected are of the task and rightly answered)")
    print(f"   {'task':10s}{'untuned':>9s}" + "".join(f"{name:>20s}" for name in methods))
    results: dict[str, list[float]] = {name: [] for name in methods}
    for row, task in enumerate(args.tasks):
        new = [instruction(draw, task) for _ in range(200)]
        print(f"   {task:10s}{loss(base, new):9.2f}", end="")
        for name in methods:
            chosen, found = selected[name][row], []
            for seed in range(args.seeds):
                torch.manual_seed(seed)
                tuned = with_adapters(base.network, lr=3e-3)
                examples = DataLoader([pool[i] for i in chosen], batch_size=16, shuffle=True)
                make_trainer(args.epochs * 2).fit(tuned, examples)
                found.append(loss(tuned, new))
            results[name].append(sum(found) / args.seeds)
            right = sum(kinds[i] == (task, True) for i in chosen) / args.top
            print(f"{results[name][-1]:13.2f} ({right:4.0%})", end="", flush=True)
        print()
    print("   Of the task, but wrongly answered, are of the selected:")
    for name, rows in selected.items():
        wrong = [kinds[i] == (task, False) for task, row in zip(args.tasks, rows, strict=True) for i in row]
        print(f"   {name:15s}{sum(wrong) / len(wrong):.1%}")
    print("   Loss on the selection of TRAK minus that on the selection of")
    for name in list(methods)[1:]:
        mean, low, high = interval(torch.tensor(results["TRAK"]) - torch.tensor(results[name]))
        print(f"   {name:15s}{mean:+.2f}  (95% interval {low:+.2f} to {high:+.2f}, over tasks)")


if __name__ == "__main__":
    main()
