"""Which passages of the training text made a language model write this, and which of their tokens?

A small GPT-2 learns a text, cut into passages, and continues prompts that it has not seen. TRAK finds the training
passages that made each continuation likely, and which tokens of both belong together. The tail patch checks this (Chang
et al. 2024, arXiv 2410.17413): one more training step on the passages that a method names should make the continuation
more likely.
"""

import argparse
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from examples.common import begin, make_trainer
from examples.texts import learn_tokenizer, line, read_text
from lightning_trak import TRAK, AttributionMixin, GradientCosine, TRAKCallback
from lightning_trak.methods import BM25, RandomScores
from lightning_trak.methods.tokens import text_tokens
from lightning_trak.outputs import CausalLMMargin, NegativeLoss
from lightning_trak.reporting.html import token_page
from lightning_trak.reporting.terminal import token_lines
from lightning_trak.reporting.tokens import Decode, ScoredText, scored_text
from lightning_trak.retraining import tail_patch

Example = dict[str, Tensor]  # input_ids, and labels as in Hugging Face: the ids, or -100 for tokens without a label


class LitCausalLM(AttributionMixin, L.LightningModule):
    """A causal language model of Hugging Face, unmodified."""

    def __init__(self, network: nn.Module, lr: float, weight_decay: float = 0.1) -> None:
        super().__init__()
        self.network = network
        self.lr, self.weight_decay = lr, weight_decay

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.network(**inputs).logits

    def configure_model_output(self) -> CausalLMMargin:
        return CausalLMMargin()

    def training_step(self, batch: Example) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return F.cross_entropy(self(**inputs)[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trainable, lr=self.lr, weight_decay=self.weight_decay)


def small_gpt2(vocab_size: int, length: int, layers: int = 2, **options: Any) -> GPT2LMHeadModel:
    """A GPT-2 of a few layers, newly initialised."""
    sizes = {"n_embd": 64, "n_layer": layers, "n_head": 4, "n_positions": length, "vocab_size": vocab_size}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(bos_token_id=None, eos_token_id=None, **sizes, **no_dropout, **options))


def generate(model: LitCausalLM, prompts: Tensor, length: int) -> list[Example]:
    """Continue prompts. Only the continuations have labels."""
    ids = model.network.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_length=length,
        do_sample=True,
        top_k=20,
        pad_token_id=0,
    )
    labels = ids.clone()
    labels[:, : prompts.shape[1]] = -100
    return [{"input_ids": row, "labels": asked} for row, asked in zip(ids, labels, strict=True)]


def explain_tokens(
    trak: TRAK, trainer: L.Trainer, train: list[Example], target: Example, decode: Decode
) -> list[ScoredText]:
    """A continuation and its two best passages, with the scores of their tokens."""
    loader, output = DataLoader([target], batch_size=1), CausalLMMargin(per_token=True)
    rows, tokens = trak.score(trainer, loader, output=output), text_tokens(trainer, loader, output)
    texts = []
    for part in trak.score_tokens(trainer, loader, trak.score(trainer, loader, top_k=2, largest=True)):
        name, explained = f"passage {part.train}", rows[:, part.train] / len(rows)
        title = f"The continuation: what {name} explains"
        texts.append(scored_text(title, target["input_ids"], tokens.positions, explained, decode))
        title = f"{name}: which of its tokens did it"
        texts.append(
            scored_text(title.capitalize(), train[part.train]["input_ids"], part.positions, part.scores, decode)
        )
    return texts


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="a text file (.gz or not); default: the manual that comes with Python"
    )
    parser.add_argument("--out", type=Path, default=Path("demo_output/language_model"), help="where all is written")
    parser.add_argument("--train", type=int, default=1200, help="training passages")
    parser.add_argument("--targets", type=int, default=50, help="prompts to continue")
    parser.add_argument("--length", type=int, default=64, help="tokens of a passage; a quarter of them are the prompt")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate")
    parser.add_argument("--vocabulary", type=int, default=1000)
    parser.add_argument("--top", type=int, default=8, help="passages of a tail patch")
    args = parser.parse_args(argv)
    run = begin(args.out)
    L.seed_everything(0, verbose=False)

    text = read_text(args.data) if args.data else "\n".join(topics[name] for name in sorted(topics))
    tokenizer = learn_tokenizer(text.splitlines(keepends=True), args.vocabulary)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    passages = ids[: len(ids) // args.length * args.length].view(-1, args.length)
    passages = passages[torch.randperm(len(passages))[: args.train + args.targets]]
    if len(passages) < args.train + args.targets:
        raise SystemExit(f"the text has {len(passages)} passages only; lower --train, --targets or --length")
    train = [{"input_ids": passage, "labels": passage} for passage in passages[: args.train]]

    print(f"1. Training on {args.train} passages of {args.length} tokens, with snapshots", flush=True)
    model = LitCausalLM(small_gpt2(len(tokenizer), args.length), args.lr)
    trainer = make_trainer(args.epochs, TRAKCallback(run / "snapshots", every_n_epochs=max(1, args.epochs // 4)))
    loader = DataLoader(train, batch_size=16, shuffle=True)
    trainer.fit(model, loader)
    model.eval()
    with torch.no_grad():
        for name, chosen in (("Training", passages[: args.targets]), ("Held-out", passages[args.train :])):
            print(f"   {name} loss {model.training_step({'input_ids': chosen, 'labels': chosen}):.2f} nats a token")

    print(f"2. Attributing {args.targets} continuations of held-out prompts", flush=True)
    targets = generate(model, passages[args.train :, : args.length // 4], args.length)
    methods = {
        "TRAK": TRAK(model, run / "snapshots", run / "features"),
        "GradientCosine": GradientCosine(model, run / "snapshots", run / "features"),
        "BM25": BM25("input_ids"),
        "random": RandomScores(),
    }
    target_loader = DataLoader(targets, batch_size=16)
    scores = {name: method.attribute(trainer, loader, target_loader) for name, method in methods.items()}
    for target in range(min(2, args.targets)):
        prompt, continuation = targets[target]["input_ids"].tensor_split([args.length // 4])
        print(f"\n   {'prompt':14s} {line(tokenizer.decode(prompt))}")
        print(f"   {'continuation':14s} {line(tokenizer.decode(continuation))}")
        for name in ("TRAK", "BM25"):
            for index in scores[name][target].topk(3).indices.tolist():
                print(f"   {name:14s} {line(tokenizer.decode(passages[index]))}")

    print("\n3. The tokens of the first continuation and of its two best passages", flush=True)
    texts = explain_tokens(methods["TRAK"], trainer, train, targets[0], tokenizer.decode)
    print(token_lines(texts, colour=sys.stdout.isatty()))
    (run / "tokens.html").write_text(token_page(texts, "Which tokens?"), encoding="utf-8")
    print(f"   The same is in {run}/tokens.html")

    print(f"\n4. Tail patch: one training step on the {args.top} passages that each method names")
    print("   rise of the continuation's log-probability, in nats a token, mean over the targets", flush=True)
    patch = tail_patch(
        model,
        trainer.optimizers[0],
        loader,
        target_loader,
        scores,
        args.top,
        jointly=True,
        output=NegativeLoss(LitCausalLM.training_step),  # called with one target at a time
    )
    print(patch.table("TRAK").markdown())


if __name__ == "__main__":
    main()
