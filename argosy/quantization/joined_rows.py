"""Several modules' parameters become rows of one: what multiplies the same input can then be one product.

Nothing is multiplied here. Invariant: names and shapes stay, so checkpoints are loaded as ever, into the same memory.
"""

from collections.abc import Sequence

from torch import nn


def share_rows(joined: nn.Module, modules: Sequence[nn.Module], name: str) -> None:
    """Parameter ``name`` of each module becomes a view of the next rows of ``joined``'s; values are not copied."""
    rows = joined.get_parameter(name)
    start = 0
    for module in modules:
        stop = start + len(module.get_parameter(name))
        setattr(module, name, nn.Parameter(rows.data[start:stop], requires_grad=False))
        start = stop
