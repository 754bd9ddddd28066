"""A training conversation, and the shares that decide which conversations are drawn.

Plain data, no generators. Invariant: shares lie between 0 and 1.
"""

from dataclasses import dataclass

from tools.train_tiny.data.example import Example


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """One training sequence before encoding."""

    turns: tuple[Example, ...]
    system: str = ""  # text before the first user turn
    is_thinking: bool = False  # steps go between <think> and </think>


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureConfig:
    """Which domain how often, and shares of the rarer shapes of a conversation."""

    # one weight per entry of DOMAINS
    domain_weights: tuple[float, ...] = (0.38, 0.19, 0.12, 0.05, 0.07, 0.05, 0.03, 0.06, 0.04, 0.01, 0.0)
    prompt_weight: float = 0.1  # loss weight of tokens the user wrote
    needle_share: float = 0.12  # conversations about one text of needles
    long_context_share: float = 0.03  # a question after an irrelevant text
    thinking_share: float = 0.07
    system_share: float = 0.05
    multi_turn_share: float = 0.05


def polish_mixture() -> MixtureConfig:
    """For the last stages: more calculation, fewer long texts, no loss on prompts, whose words cannot be foreseen."""
    return MixtureConfig(
        domain_weights=(0.37, 0.16, 0.12, 0.04, 0.06, 0.05, 0.01, 0.025, 0.015, 0.005, 0.14),
        prompt_weight=0.0,
        needle_share=0.05,
        long_context_share=0.02,
    )
