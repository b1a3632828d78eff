"""What two processes run in `test_fsdp.py`; Lightning's launcher starts this script a second time by itself."""

import sys
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader, Subset

from lightning_trak import TRAK
from lightning_trak.projections import SparseProjection
from tests.end_to_end.test_fsdp import (
    RARE,
    Augmented,
    Bypassing,
    Clip,
    Closure,
    Gpt,
    Halved,
    Neighbours,
    Net,
    Noisy,
    Sometimes,
    Sorted,
    axes_trak,
    clip_trak,
    gpt_trak,
    make_pairs,
    make_sentences,
    net_trak,
    principal_trak,
)
from tests.launch import leave_together
from tests.lit import make_data, make_trainer


def main(root: Path) -> None:
    torch.manual_seed(0)  # a closure's model is part of what its code is
    train, targets = make_data(53), make_data(11, seed=1)  # 9 shards of 6 and 6 batches of 2: neither are even
    trainer = make_trainer(strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1), devices=2)
    results: dict[str, object] = {}

    for store, make in {"net": Net, "begun by one": Net, "begun by two": Net}.items():
        trak = net_trak(root, store, make())
        trak.featurize(trainer, DataLoader(train, batch_size=4, shuffle=True), shard_size=6)
        results[store] = trak.score(trainer, DataLoader(targets, batch_size=2))
    top = trak.score(trainer, DataLoader(targets, batch_size=3, num_workers=1), top_k=5, largest=True)
    results["top"] = tuple(top)
    some = DataLoader(Subset(train, [52, 0, 7]), batch_size=2)
    results["candidates"] = trak.score(trainer, DataLoader(targets, batch_size=2), train=some)
    results["one target"] = trak.score(trainer, Subset(targets, [0]))

    mixed = make_trainer(
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1), devices=2, precision="bf16-mixed"
    )
    results["mixed"] = net_trak(root, "mixed", Net()).attribute(mixed, DataLoader(train, batch_size=4), targets)

    with torch.device("meta"):  # which a model is made on if it is too large for one process
        meta = Net()
    meta.scale = torch.tensor(1.5)  # no checkpoint has it
    results["meta"] = net_trak(root, "meta", meta).attribute(trainer, train, targets)

    for name, trak, data in (
        ("gpt", gpt_trak(root, Gpt()), make_sentences),
        ("clip", clip_trak(root, Clip()), make_pairs),
        ("axes", axes_trak(root, Net()), make_data),
        ("principal", principal_trak(root, Net()), make_data),
    ):
        trak.featurize(trainer, DataLoader(data(15), batch_size=2), shard_size=4)
        results[name] = trak.score(trainer, DataLoader(data(3), batch_size=2))

    def refusal(call) -> str:
        try:
            call()
        except (ValueError, RuntimeError) as error:
            return str(error)
        return ""

    results["bypassing"] = refusal(lambda: net_trak(root, "bypassing", Bypassing()).featurize(trainer, train))
    results["halved"] = refusal(lambda: clip_trak(root, Halved(), "halved").featurize(trainer, make_pairs(4)))
    for name, model, audit in (
        ("sometimes", Sometimes, 8),
        ("sorted", Sorted, 0),
        ("neighbours", Neighbours, 2),
        ("noisy", Noisy, 2),
        ("closure", Closure, 2),
    ):
        trak = net_trak(root, name, model(), audit=audit)
        results[name] = refusal(partial(trak.featurize, trainer, DataLoader(train, batch_size=4), shard_size=8))
    common = Subset(train, (train.tensors[0][:, 0] < RARE).nonzero()[:, 0].tolist())
    rare = Subset(train, [*range(10), int(train.tensors[0][:, 0].argmax())])
    trak = net_trak(root, "sometimes in targets", Sometimes(), audit=11)
    trak.featurize(trainer, DataLoader(common, batch_size=4))
    results["sometimes in targets"] = refusal(lambda: trak.score(trainer, DataLoader(rare, batch_size=4)))
    results["augmented"] = refusal(lambda: net_trak(root, "augmented", Net()).featurize(trainer, Augmented()))
    results["scorer"] = refusal(
        lambda: trainer.predict(net_trak(root, "net", Net()).scorer(), DataLoader(targets, batch_size=2))
    )
    own = f"own of {trainer.global_rank}"
    results["own"] = refusal(
        lambda: net_trak(root, own, Net()).featurize(trainer, train, shard_size=6 + trainer.global_rank)
    )
    trained = Net()
    fitting = make_trainer(
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1), devices=2, max_epochs=1
    )
    fitting.fit(trained, DataLoader(train, batch_size=16))
    results["trained"] = refusal(lambda: net_trak(root, "net", trained).score(trainer, targets))
    # A new instance is what the message asks for, with the Trainer that has fitted.
    results["fitted"] = TRAK(
        Net(), torch.load(root / "checkpoints.pt"), root / "net", projection=SparseProjection(32)
    ).score(fitting, targets)
    torch.save(results, root / f"rank-{trainer.global_rank}.pt")
    leave_together()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
