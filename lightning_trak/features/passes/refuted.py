"""What to do when an engine gets a gradient wrong while ``trainer.predict`` makes features: go on with the next one."""

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_trak.features.engines import EngineName, following_engine
from lightning_trak.features.passes.featurize_module import FeaturizeModule
from lightning_trak.running.ranks import Ranks


def refuted_engine(module: FeaturizeModule, ranks: Ranks) -> tuple[EngineName, str] | None:
    """The engine that a rank has found to be wrong, and why; None if it is right. All ranks get the same answer.

    Args:
        module: what ``trainer.predict`` has run.
        ranks: the processes that share the work; all must call this.
    """
    reports = ranks.gather((module.engine_name, module.refuted))
    found = [(name, reason) for name, reason in reports if name is not None and reason is not None]
    return found[0] if found else None


def next_engine(used: EngineName, reason: str, user: str, what: str) -> EngineName:
    """The engine that replaces one that is wrong, with a warning.

    Args:
        used: the engine that is wrong.
        reason: why.
        user: the name of the method that needs the features.
        what: which features are computed again.
    """
    following = following_engine(used)
    rank_zero_warn(
        f"{user}: engine {used!r} cannot differentiate this model correctly, so {what} are computed again with engine"
        f" {following!r}: {reason}"
    )
    return following
