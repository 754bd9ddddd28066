"""A share of correct answers and its confidence interval. Pure arithmetic.

Invariant: the interval contains the share and stays within [0, 1], also when all or none are correct.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

Z_95 = 1.959964  # the normal distribution's 97.5 % quantile


@dataclass(frozen=True, slots=True)
class Score:
    num_correct: int
    num_questions: int

    @staticmethod
    def of(results: Iterable[bool]) -> "Score":
        all_results = list(results)
        return Score(sum(all_results), len(all_results))

    @property
    def share(self) -> float:
        return self.num_correct / self.num_questions if self.num_questions else 0.0


def wilson_interval(score: Score, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval: unlike share +- z * error it is right for shares near 1, where ours should be."""
    if score.num_questions == 0:
        return 0.0, 1.0
    total, share = score.num_questions, score.share
    centre = share + z * z / (2 * total)
    margin = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - margin) / scale), min(1.0, (centre + margin) / scale)


def group_scores(results: Iterable[tuple[str, bool]]) -> list[tuple[str, Score]]:
    """Scores by name, in alphabetical order."""
    groups: dict[str, list[bool]] = {}
    for name, is_correct in results:
        groups.setdefault(name, []).append(is_correct)
    return [(name, Score.of(groups[name])) for name in sorted(groups)]
