"""Training examples whose features are not finite: an error that all processes raise, or a note of what is left out."""

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_trak.features.finiteness import NotFiniteError, NotFiniteExamples, named
from lightning_trak.features.model import ModelCopy
from lightning_trak.features.passes.options import OnNan
from lightning_trak.features.store import FeatureStore
from lightning_trak.running.ranks import Ranks


def require_none_skipped(store: FeatureStore) -> None:
    """Refuse a store in which an earlier run has left examples out.

    Raises:
        NotFiniteError: if there are any.
    """
    skipped = store.skipped
    if skipped:
        raise NotFiniteError(
            f'an earlier run with on_nan="skip" has left out {named(skipped)}: leave on_nan out to go on without them,'
            " or use another directory or overwrite=True after the data were corrected",
            skipped,
        )


def require_finite_or_skipped(
    mine: NotFiniteExamples, on_nan: OnNan, model: ModelCopy, store: FeatureStore, ranks: Ranks
) -> None:
    """Raise for examples whose features are not finite, or say which were skipped. All ranks must call this.

    Args:
        mine: the examples that this process has found.
        on_nan: what to do about them.
        model: names the checkpoints.
        store: the store.
        ranks: the processes that share the work.

    Raises:
        NotFiniteError: on all ranks, naming the examples that any rank has found; or if none is left to score.
    """
    found = NotFiniteExamples()
    for theirs in ranks.gather(mine):
        found.update(theirs)
    if on_nan == "raise":
        found.require_none(model.places)
    elif found.found:
        skipped = store.skipped
        if len(skipped) == store.num_examples:
            raise NotFiniteError(
                "no training example has finite features at all checkpoints"
                f" ({next(iter(found.about.values()))}), so that none is left to score: look for NaN in the weights",
                skipped,
                min(found.found),
            )
        rank_zero_warn(f"TRAK: {named(skipped)} are not finite; their scores are 0, and they are never among the top_k")
