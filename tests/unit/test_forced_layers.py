"""Layers that are compared with another run's, each with that run's input."""

from collections.abc import Sequence

import torch
from torch import nn

from benchmarks.steps.forced_layers import compare_layers, forced_layers, recorded_layers


class Mixing(nn.Module):
    """Adds ``factor`` times its reversed rows, as a decoder layer hands them on: not yet added."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self._factor = factor

    def forward(
        self, hidden_states: torch.Tensor, delta: torch.Tensor | None, batch: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert batch == "batch"
        total = hidden_states if delta is None else hidden_states + delta
        return total, self._factor * total.flip(1)


def run(layers: Sequence[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    with recorded_layers(layers) as outputs:
        hidden_states, delta = x, None
        for layer in layers:
            hidden_states, delta = layer(hidden_states, delta, "batch")
    return outputs


def test_a_wrong_layer_shows_in_its_own_output_alone() -> None:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    right = [Mixing(0.3), Mixing(0.5), Mixing(0.25)]
    wrong = [right[0], Mixing(0.1), right[2]]
    expected = run(right, x)
    with forced_layers(wrong, expected):
        forced = run(wrong, x)
    assert torch.equal(forced[0], expected[0]) and torch.equal(forced[2], expected[2])
    first, second, third = compare_layers(forced, expected)
    assert first.min() > 1 - 1e-6 and third.min() > 1 - 1e-6
    assert second.max() < 0.999
    assert not torch.equal(run(wrong, x)[2], expected[2]), "it still runs forced"
