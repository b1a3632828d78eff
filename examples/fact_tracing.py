"""Where did a language model learn its facts?

A small GPT-2 learns to fill the blanks in sentences that state facts. It is then asked for these facts, as in "anna
berg was born in [MASK] .". For facts that it knows, TRAK and BM25 rank the sentences. Two things are measured: whether
the first sentences state the fact (mean reciprocal rank, recall), and whether the model loses the fact when it is
trained without them.

Run it as `python -m examples.fact_tracing`. With --data, facts and sentences are read from files like LAMA's T-REx;
examples/facts.py says what they hold. Without, facts about invented people are made.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader, Subset
from torchmetrics.retrieval import RetrievalMRR, RetrievalRecall

from examples.common import begin, make_trainer, read_rows
from examples.facts import PAD, make_data, make_facts
from examples.language_model import LitCausalLM, small_gpt2
from lightning_trak import TRAK, TRAKCallback
from lightning_trak.methods import BM25, RandomScores
from lightning_trak.reporting.plots import plot_outcomes
from lightning_trak.retraining import RetrainingFleet, joint_removal_mask


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="directory of facts.jsonl and sentences.jsonl (or .jsonl.gz)")
    parser.add_argument(
        "--out", type=Path, default=Path("demo_output/fact_tracing"), help="where everything is written"
    )
    parser.add_argument("--facts", type=int, default=160, help="facts to learn, drawn at random")
    parser.add_argument("--queries", type=int, default=30, help="learned facts to trace")
    parser.add_argument("--models", type=int, default=4, help="models that TRAK averages over")
    parser.add_argument("--seeds", type=int, default=3, help="models to retrain for each set of removed sentences")
    parser.add_argument("--epochs", type=int, default=40)
    args = parser.parse_args(arguments)
    started = time.time()
    run = begin(args.out)
    facts, sentences = [read_rows(args.data, name) for name in ("facts", "sentences")] if args.data else make_facts(40)
    train, queries, relevant = make_data(facts, sentences, args.facts)
    train_loader = DataLoader(train, batch_size=32)
    print(f"{len(train)} sentences state {len(queries)} facts, with {len(train.vocabulary)} words")

    def make_model() -> LitCausalLM:
        network = small_gpt2(len(train.vocabulary) + 3, train.length, layers=1, tie_word_embeddings=False)
        return LitCausalLM(network, lr=3e-3, weight_decay=0.01)

    print(f"1. Training {args.models} models", flush=True)
    snapshots, outputs = [], []
    for seed in range(args.models):
        L.seed_everything(seed, verbose=False)
        model = make_model()
        snapshots.append(run / f"snapshots{seed}")
        make_trainer(args.epochs, TRAKCallback(snapshots[-1], every_n_epochs=-(-args.epochs // 2))).fit(
            model, DataLoader(train, batch_size=32, shuffle=True)
        )
        with torch.no_grad():
            batches = DataLoader(queries, batch_size=100)
            outputs.append(torch.cat([model.configure_model_output().output(model, batch) for batch in batches]))
    known = (torch.stack(outputs) > 0).all(0)  # a margin above 0 is a probability above 1/2
    print(f"   all of them answer {int(known.sum())} of {len(queries)} queries", flush=True)
    if not known.any():
        raise SystemExit("There is nothing to trace: train with more --epochs, or on more sentences for each fact.")
    chosen = known.nonzero().flatten()
    traced = min(args.queries, -(-len(chosen) // 2))  # the other facts show what else is lost
    relevant, targets = relevant[chosen[:traced]], Subset(queries, chosen[:traced].tolist())

    print(f"2. Tracing {traced} of them", flush=True)
    trainer = make_trainer(args.epochs)
    methods = {
        "TRAK": TRAK(model, snapshots, run / "features", dtype="int8"),
        "BM25": BM25(lambda item: item["input_ids"][item["input_ids"] != PAD]),
        "random": RandomScores(),
    }
    scores = {name: method.attribute(trainer, train_loader, targets) for name, method in methods.items()}
    rows = torch.arange(traced).repeat_interleave(len(train))
    for name, values in scores.items():
        pairs = (values.flatten(), relevant.flatten())
        mrr, recall = (metric(*pairs, indexes=rows).item() for metric in (RetrievalMRR(), RetrievalRecall(top_k=10)))
        print(f"   {name:8s} MRR {mrr:.2f}   recall@10 {recall:.2f}")

    print(f"3. Retraining without them, {args.seeds} times each", flush=True)
    stating = relevant.any(0)
    arms = {"nothing": torch.ones_like(stating), "annotated": ~stating}
    for name, values in scores.items():
        counts = {f"{name} x {factor}": factor * int(stating.sum()) for factor in (1, 2)}
        arms |= {arm: joint_removal_mask(values, count) for arm, count in counts.items() if count < len(train)}
    fleet = RetrainingFleet(
        run / "fleet",
        make_model,
        partial(make_trainer, args.epochs),
        train_loader,
        Subset(queries, chosen.tolist()),
        torch.stack([*arms.values()]),
        num_seeds=args.seeds,
    )
    fleet.run()
    print(f"   {'removed':12s} sentences  answered  log-odds of the answer  answered, not traced")
    answered = {  # for each set and model
        "queries traced": (fleet.outputs[:traced] > 0).float().mean(0),
        "other queries": (fleet.outputs[traced:] > 0).float().mean(0),
    }
    for number, (name, kept) in enumerate(arms.items()):
        share, other_share = (shares[number].mean() for shares in answered.values())
        log_odds = fleet.outputs[:traced, number].mean()
        print(f"   {name:12s} {int((~kept).sum()):9d} {share:9.2f} {log_odds:9.1f} {other_share:21.2f}")
    plot_outcomes([*arms], answered, "share answered by models retrained without sentences (dots: models)").savefig(
        run / "removed.png", dpi=120
    )

    print("4. Where it learned these (* marks sentences that state the fact)")
    for row, query in enumerate(chosen[: min(3, traced)].tolist()):
        print(f"   {queries.show(query)}")
        for name in ("TRAK", "BM25"):
            for index in scores[name][row].topk(3).indices.tolist():
                print(f"      {name}  {'*' if relevant[row, index] else ' '} {train.show(index)}")
    print(f"Wrote {run}/removed.png in {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
