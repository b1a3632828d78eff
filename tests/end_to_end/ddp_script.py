"""What two processes run in `test_distributed.py`; Lightning's launcher starts this script a second time by itself."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

from lightning_trak import TRAK, GradientCosine, TracIn, TrainingRecorder
from lightning_trak.cleaning import duplicates, harmful
from lightning_trak.methods import (
    EKFACInfluence,
    InfluenceFunction,
    Metagradient,
    RepresentationSimilarity,
    TrainingLoss,
)
from lightning_trak.outputs import CausalLMMargin, ClassificationMargin, ContrastiveMargin
from lightning_trak.projections import SparseProjection
from lightning_trak.scoring.newton import gram
from tests.causal_texts import loader, make_texts
from tests.end_to_end.test_distributed import (
    CLASSES,
    PREDICTED,
    PRINCIPAL,
    RATES,
    SOURCES,
    TOWERS,
    UNSURE,
    make_exact,
    make_pairs,
    make_shapley,
    make_texts_method,
    ranked,
)
from tests.lit import make_data, make_model, make_trainer


def main(root: Path) -> None:
    train, targets = make_data(53), make_data(11, seed=1)  # neither divides by two, nor do their shards
    checkpoints = torch.load(root / "checkpoints.pt")
    trainer = make_trainer(strategy="ddp", devices=2)
    results: dict[str, object] = {}

    def attribute(store: str, train_loader: DataLoader, target_loader: DataLoader, dtype: str = "float32") -> TRAK:
        trak = TRAK(make_model(), checkpoints, root / store, projection=SparseProjection(32), dtype=dtype)
        trak.featurize(trainer, train_loader, shard_size=6)
        results[store] = trak.score(trainer, target_loader)
        return trak

    trak = attribute("shuffled", DataLoader(train, batch_size=4, shuffle=True), DataLoader(targets, batch_size=2))
    top = trak.score(trainer, DataLoader(targets, batch_size=3), top_k=5)
    results["top"] = [tuple(end) for end in top]
    rescored = trak.score(trainer, DataLoader(targets, batch_size=3), top_k=5, rescore=20)
    results["rescored"] = [tuple(end) for end in rescored]
    results["classes"] = trak.score(trainer, DataLoader(targets, batch_size=3), aggregate="mean", groups=CLASSES)
    results["shares"] = trak.score(trainer, DataLoader(targets, batch_size=3), train_groups=SOURCES)
    results["chosen"] = trak.score(trainer, DataLoader(targets, batch_size=3), train=[50, 3])
    ends = trak.score(trainer, DataLoader(targets, batch_size=3), top_k=5, output=ClassificationMargin(labels=1))
    results["both ends"] = tuple(ends.opponents)
    images, new = TensorDataset(UNSURE), DataLoader(make_data(7, seed=5), batch_size=2)
    results["predicted"] = trak.score(trainer, images, output=PREDICTED)
    results["candidates"] = trak.score(trainer, DataLoader(targets, batch_size=3), train=new)
    interval = trak.score(trainer, targets, top_k=4, train=new, aggregate="mean", interval=0.9)
    results["interval"] = [tuple(end) for end in interval.low]
    results["one target"] = trak.score(trainer, DataLoader(Subset(targets, [0]), batch_size=3))
    results["self influence"] = trak.self_influence(trainer)
    cosine = GradientCosine(make_model(), checkpoints, root / "shuffled", projection=SparseProjection(32))
    results["label suspicion"] = cosine.label_suspicion(trainer, DataLoader(train, batch_size=4))
    results["duplicates"] = ranked(duplicates(trak, trainer, DataLoader(train, batch_size=4), threshold=0.8))
    results["harmful"] = ranked(harmful(trak, trainer, DataLoader(train, batch_size=4), targets))
    loss = TrainingLoss(make_model(), checkpoints)
    results["training loss"] = loss.label_suspicion(trainer, DataLoader(train, batch_size=4))
    # Lightning deals the targets of its own loader out to the ranks: rows 0, 2, 4, ... here, rows 1, 3, 5, ... there.
    mine = torch.cat(trainer.predict(trak.scorer(), DataLoader(targets, batch_size=4)))
    results[f"scorer on rank {trainer.global_rank}"] = mine
    tracin = TracIn(make_model(), checkpoints, root / "shuffled", projection=SparseProjection(32), learning_rates=RATES)
    results["TracIn"] = tracin.attribute(trainer, DataLoader(train, batch_size=4), DataLoader(targets, batch_size=2))
    mine = torch.cat(trainer.predict(tracin.scorer(), DataLoader(targets, batch_size=4)))
    results[f"TracIn's scorer on rank {trainer.global_rank}"] = mine
    sampler = DistributedSampler(train, num_replicas=2, rank=trainer.global_rank)  # repeats an example to make 54
    attribute("sampler", DataLoader(train, batch_size=4, sampler=sampler), DataLoader(targets, num_workers=1))
    attribute("int4", DataLoader(train, batch_size=4), DataLoader(targets, batch_size=4), "int4")
    attribute("begun by one", DataLoader(train, batch_size=6, num_workers=2), DataLoader(targets, batch_size=50))

    principal = TRAK(make_model(), checkpoints, root / "principal", projection=PRINCIPAL)
    principal.featurize(trainer, DataLoader(train, batch_size=4), shard_size=6)
    results["principal"] = principal.score(trainer, DataLoader(targets, batch_size=3))

    rows, gram._ROWS = gram._ROWS, 8  # several blocks, for the ranks to share
    for name, method in make_exact(root, checkpoints).items():  # fewer examples than parameters: the dual
        method.featurize(trainer, DataLoader(train, batch_size=4), shard_size=6)
        results[name] = method.score(trainer, DataLoader(targets, batch_size=3))
        results[f"{name}, candidates"] = method.score(trainer, DataLoader(targets, batch_size=3), train=new)
        results[f"{name}, self influence"] = method.self_influence(trainer)
        mine = torch.cat(trainer.predict(method.scorer(), DataLoader(targets, batch_size=4)))
        results[f"{name}, scorer on rank {trainer.global_rank}"] = mine
    gram._ROWS = rows

    pairs = TRAK(TOWERS, [TOWERS.state_dict()], root / "pairs", output=ContrastiveMargin(context_size=9))
    pairs.featurize(trainer, make_pairs(20))
    results["pairs"] = pairs.score(trainer, make_pairs(5))

    texts = make_texts_method(root / "texts")
    texts.featurize(trainer, loader(make_texts(11)), shard_size=3)
    asked = CausalLMMargin(per_token=True)
    results["tokens"] = texts.score(trainer, loader(make_texts(3, seed=1)), output=asked)
    parts = texts.score_tokens(trainer, loader(make_texts(3, seed=1)), [(2, 10), (0, 3)])
    results["parts"] = [part.scores for part in parts]

    similarity = RepresentationSimilarity(make_model(), checkpoints)
    results["similarity"] = similarity.attribute(trainer, DataLoader(train, batch_size=4), Subset(targets, [0]))
    results["shapley"] = make_shapley().attribute(trainer, Subset(train, range(4)), targets)

    unfinished = TRAK(make_model(), checkpoints, root / "continued by one", projection=SparseProjection(32))
    unfinished.featurize(trainer, DataLoader(train, batch_size=4), shard_size=6)
    if trainer.global_rank == 0:  # alone, while the process group of both is still there
        alone = TRAK(make_model(), checkpoints, root / "alone", projection=SparseProjection(32))
        alone.featurize(make_trainer(), train)
        results["alone"] = alone.score(make_trainer(), targets)
    own = make_model(seed=trainer.global_rank)
    recording = root / f"recording-{trainer.global_rank}"
    make_trainer(max_epochs=1, callbacks=[TrainingRecorder(recording)]).fit(own, DataLoader(train, batch_size=27))
    for method in (
        TRAK(own, store=root / "other weights"),
        RepresentationSimilarity(own),
        EKFACInfluence(own),
        InfluenceFunction(own),
        Metagradient(own, recording, check_smooth=False),
    ):
        with pytest.raises(ValueError, match="than on rank 0") as refused:
            method.attribute(trainer, train, Subset(targets, [0]))
        results[f"{type(method).__name__} with other weights"] = str(refused.value)
    torch.save(results, root / f"rank-{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    dist.destroy_process_group()
