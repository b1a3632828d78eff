"""Which training pairs taught a text classifier to say that a sentence answers a question?

A small Hugging Face encoder reads a question and a sentence, as in QNLI, and learns whether the sentence answers the
question (or, as in RTE, whether one sentence entails another). TRAK finds the training pairs that moved a held-out
prediction towards its label, and those that moved it away. Retraining on random halves of the data measures how far to
trust this.
"""

import argparse
from functools import partial
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding
from transformers.utils import logging

from examples.common import begin, make_trainer
from examples.entailment import Pair, generate, read
from examples.texts import learn_tokenizer, line
from lightning_trak import TRAK, AttributionMixin, LinearDatamodelingScore, TracIn, TRAKCallback
from lightning_trak.methods import BM25
from lightning_trak.outputs import ClassificationMargin
from lightning_trak.retraining import RetrainingFleet, random_subsets


class LitPairs(AttributionMixin, L.LightningModule):
    """A Hugging Face encoder that classifies pairs of texts."""

    def __init__(self, pretrained: str | None, vocab_size: int, lr: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        if pretrained is None:
            sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
            no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            config = AutoConfig.for_model("bert", vocab_size=vocab_size, **sizes, **no_dropout)
            self.encoder = AutoModelForSequenceClassification.from_config(config)
        else:
            # from_pretrained returns eval mode, and Lightning would not change it.
            self.encoder = AutoModelForSequenceClassification.from_pretrained(pretrained, num_labels=2).train()

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.encoder(**inputs).logits

    def configure_model_output(self) -> ClassificationMargin:
        return ClassificationMargin()

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        return self.encoder(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"], weight_decay=0.01)


def show(pair: Pair) -> str:
    """On one line: whether the sentence answers the question, and both."""
    return f"{('no', 'yes')[pair[2]]:4s} {line(pair[0])} | {line(pair[1])}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train.tsv and dev.tsv (or .tsv.gz); default: generated")
    parser.add_argument("--out", type=Path, default=Path("demo_output/text_pairs"), help="where everything is written")
    parser.add_argument("--pretrained", help="name or folder of a pretrained encoder; default: a small new one")
    parser.add_argument("--train", type=int, default=600, help="training pairs")
    parser.add_argument("--targets", type=int, default=100, help="held-out pairs")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--runs", type=int, default=6, help="models to attribute: scores are averaged over them")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate (2e-5 suits pretrained encoders)")
    parser.add_argument("--subsets", type=int, default=30, help="random halves to retrain on, twice each")
    args = parser.parse_args(argv)
    run = begin(args.out)
    L.seed_everything(0, verbose=False)

    if args.data is None:
        train, targets = generate(args.train, seed=0), generate(args.targets, seed=1)
    else:
        train, targets = read(args.data, "train", args.train), read(args.data, "dev", args.targets)
    if args.pretrained:
        logging.set_verbosity_error()  # otherwise every loaded model warns that its head is new
        logging.disable_progress_bar()
        tokenizer, config = (kind.from_pretrained(args.pretrained) for kind in (AutoTokenizer, AutoConfig))
        longest = getattr(config, "max_position_embeddings", tokenizer.model_max_length)
        tokenizer.model_max_length = min(longest, tokenizer.model_max_length)  # model_max_length is not always saved
    else:
        tokenizer = learn_tokenizer((text for pair in train for text in pair[:2]), vocab_size=4000)
    loader, target_loader = (
        DataLoader(
            [dict(tokenizer(first, second, truncation=True), label=label) for first, second, label in pairs],
            batch_size=32,
            collate_fn=DataCollatorWithPadding(tokenizer),
            shuffle=shuffle,
        )
        for pairs, shuffle in ((train, True), (targets, False))
    )
    make_module = partial(LitPairs, args.pretrained, len(tokenizer), args.lr)

    print(f"1. Training {args.runs} models on {len(train)} pairs, with snapshots", flush=True)
    snapshots = [run / f"snapshots{number}" for number in range(args.runs)]
    for directory in snapshots:
        model = make_module()
        trainer = make_trainer(args.epochs, TRAKCallback(directory, every_n_epochs=max(1, args.epochs // 4)))
        trainer.fit(model, loader)

    print(f"2. Attributing {len(targets)} held-out pairs", flush=True)
    methods = {
        "TRAK": TRAK(model, snapshots, run / "features"),
        "TRAK, one model": TRAK(model, snapshots[0], run / "features0"),
        "TracIn": TracIn(model, snapshots, run / "features"),
    }
    scores = {name: method.attribute(trainer, loader, target_loader) for name, method in methods.items()}
    labels, target_labels = (torch.tensor([label for *_, label in pairs]) for pairs in (train, targets))
    agree = target_labels[:, None] == labels
    overlap = BM25("input_ids").attribute(trainer, loader, target_loader)
    scores["BM25, label's sign"] = torch.where(agree, overlap, -overlap)

    print(f"3. Retraining twice on each of {args.subsets} random halves", flush=True)
    masks = random_subsets(len(train), args.subsets, seed=1)
    new_trainer = partial(make_trainer, args.epochs)
    fleet = RetrainingFleet(run / "fleet", make_module, new_trainer, loader, target_loader, masks, num_seeds=2)
    fleet.run(progress_bar=False)
    correct = (fleet.outputs > 0).float().mean()
    print(f"   These models label {correct:.0%} of the held-out pairs correctly")

    print("4. Linear datamodeling score: rank correlation of predicted and retrained outputs")
    for name, values in scores.items():
        lds = LinearDatamodelingScore(masks)
        lds.update(values, fleet.outputs)
        low, high = lds.interval()
        print(f"   {name:20s} LDS {lds.compute():.3f}  (95% interval {low:.3f} to {high:.3f})")
    print(f"   The highest that can be expected, because retraining is noisy: {lds.noise_ceiling():.3f}")

    print("5. Which training pairs made the model say this?")
    trak = scores["TRAK"]
    for target in range(min(3, len(targets))):
        print(f"\n   {'target':16s}{show(targets[target])}")
        for kind, largest in (("positive", True), ("negative", False)):
            for index in trak[target].topk(4, largest=largest).indices.tolist():
                print(f"   {kind} {trak[target, index]:+.3f} {show(train[index])}")
    for kind, largest in (("positive", True), ("negative", False)):
        share = agree.gather(1, trak.topk(min(10, len(train)), largest=largest).indices).float().mean()
        print(f"   Of the ten most {kind} pairs of every target, {share:.0%} have the target's label")


if __name__ == "__main__":
    main()
