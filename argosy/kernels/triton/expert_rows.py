"""How many rows an expert is to be expected to get, for the choice of a tile. Arithmetic on the host alone."""

import math


def count_usual_rows(num_rows: int, num_experts: int) -> float:
    """What almost all experts stay below when tokens choose at random: the mean and two standard deviations. One
    expert gets all rows."""
    if num_experts == 1:
        return num_rows
    mean_rows = num_rows / num_experts
    return mean_rows + 2 * math.sqrt(mean_rows)
