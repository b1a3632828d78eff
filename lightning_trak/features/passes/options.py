"""What can be asked of a call of ``featurize``, other than the data."""

from typing import Literal, TypedDict

from lightning_trak.running.parts import Part

OnNan = Literal["raise", "skip"]


class Featurizing(TypedDict, total=False):
    """The keyword arguments of ``featurize``.

    Attributes:
        overwrite: whether to delete what the store's directory holds of other runs: a store that was made with other
            settings or other data, and features at checkpoints that this object does not name. What this call would
            compute is kept. Only files that this package wrote are deleted, and none while another process reads or
            writes the store. Default: False, a store that was made otherwise is refused.
        on_nan: what to do about training examples whose features are not finite. ``"raise"``: all others are computed,
            and a :class:`~lightning_trak.features.finiteness.NotFiniteError` names these; its ``positions`` lists all.
            If none of the first hundred examples is finite, the rest is not computed. ``"skip"``: they are left out.
            An example that is left out at one of the checkpoints has a score of 0, is never among the ``top_k``, is not
            part of a curvature matrix at that checkpoint, and is in the method's ``skipped``. None, the default:
            ``"skip"`` if the store has left some out already, else ``"raise"``.
        part: ``"3/16"`` or ``(3, 16)``: compute only the third of sixteen parts of the work. Processes that know
            nothing of each other, on any machines that see the store, compute one part each, at any time and in any
            order. The store is complete when all are done. Default: all of it.
    """

    overwrite: bool
    on_nan: OnNan | None
    part: Part | None
