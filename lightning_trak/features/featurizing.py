"""What can be asked of a call of ``featurize``, other than the data."""

from typing import TypedDict


class Featurizing(TypedDict, total=False):
    """The keyword arguments of ``featurize``.

    Attributes:
        overwrite: whether to delete what the store's directory holds of other runs: a store that was made with other
            settings or other data, and features at checkpoints that this object does not name. What this call would
            compute is kept. Only files that this package wrote are deleted, and none while another process reads or
            writes the store. Default: False, a store that was made otherwise is refused.
    """

    overwrite: bool
