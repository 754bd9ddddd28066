"""Each layer's output for another run's input, so that ranks that share the work can be compared with one card.

Free running, a model in bfloat16 is no measure of that. A row-parallel product rounds each rank's part before parts are
added, where one card rounds once; wherever two experts or positions nearly tie, the last bit decides, and that token
goes on with another expert's output. On random weights such ties are many: on the small dimensions of
``parallel_step.py`` (CPU, 5 layers) tp 2 is as far from one rank, in the middle of the prompts a cosine of 0.992, as
one rank in bfloat16 is from itself in float32, 0.991; the layer before the first choice agrees to 0.99996 at worst.
With the same input in both runs a flip moves its own token in its own layer, and whatever is computed wrongly moves
all tokens of one. Invariant: the model is as before when a context ends.

Shape letters: t tokens of this rank's slice, D hidden.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import nn


@contextmanager
def recorded_layers(layers: Sequence[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """A list that each layer's output is added to as it runs: [t, D], what it would add to the residual included."""
    outputs: list[torch.Tensor] = []

    def record(layer: nn.Module, inputs: object, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        hidden_states, delta = output
        outputs.append(hidden_states + delta)

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_hook(record).remove)
        yield outputs


@contextmanager
def forced_layers(layers: Sequence[nn.Module], outputs: Sequence[torch.Tensor]) -> Iterator[None]:
    """Each layer but the first takes what the one before put out in another run: ``outputs``, [t, D] each."""

    with ExitStack() as hooks:
        for layer, forced in zip(layers[1:], outputs[:-1], strict=True):

            def force(
                layer: nn.Module, inputs: tuple[object, ...], forced: torch.Tensor = forced
            ) -> tuple[object, ...]:
                return forced, None, *inputs[2:]

            hooks.callback(layer.register_forward_pre_hook(force).remove)
        yield


def compare_layers(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Each layer's cosines, one a token, ascending: [t] float64."""
    return [
        F.cosine_similarity(one.double(), other.double(), dim=-1).sort().values
        for one, other in zip(actual, expected, strict=True)
    ]
