"""Names selected parameters that training has left as they were."""

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_trak.features.model import ModelCopy
from lightning_trak.texts.messages import listed


def warn_of_untrained(model: ModelCopy) -> None:
    """Warn if snapshots say that no optimizer had some of the selected parameters.

    Nothing is said if a checkpoint does not say which parameters its optimizer had, or if these are none of the
    selected ones: they may have other names.

    Args:
        model: the copy of the model.
    """
    trained: set[str] = set()
    for checkpoint in model.checkpoints:
        groups = () if checkpoint.record is None else checkpoint.record.parameter_groups
        named = {name for group in groups for name in group.parameters}
        if not named:
            return
        trained |= named
    others = [name for name in model.names if name not in trained]
    if others and len(others) < len(model.names):
        rank_zero_warn(
            f"the snapshots say that no optimizer had {len(others)} of {len(model.names)} selected parameters, so that"
            f" training could not change them: {listed(others)}. Scores take them as trained, like the others; to leave"
            " them out, select those that were trained with parameters=, or call requires_grad_(False) on the others"
        )
