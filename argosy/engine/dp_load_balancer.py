"""Which replica gets the next request: the one with the fewest tokens in flight, ties to the lowest dp rank.

Tokens of a prompt and of the output so far count from the moment a request is given to a replica until it ends. It
sends nothing and knows no request's content. Invariant: a replica's load is the sum over its unfinished requests.
"""


class DPLoadBalancer:
    """The loads of all replicas, in tokens."""

    def __init__(self, num_replicas: int) -> None:
        self._loads = [0] * num_replicas
        self._requests: dict[str, list[int]] = {}  # request_id -> dp rank, tokens

    @property
    def num_replicas(self) -> int:
        return len(self._loads)

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    @property
    def tokens_in_flight(self) -> tuple[int, ...]:
        """By dp rank."""
        return tuple(self._loads)

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Unfinished requests, in the order they were added."""
        return tuple(self._requests)

    @property
    def imbalance(self) -> float:
        """The largest load over the mean load: 1 is even, and so is having nothing to do."""
        total = sum(self._loads)
        return max(self._loads) * self.num_replicas / total if total else 1.0

    def add(self, request_id: str, num_tokens: int, dp_rank: int | None = None) -> int:
        """Give a request to a replica, to ``dp_rank`` if one is named; returns its dp rank.

        Raises:
            ValueError: no such replica, or the id is in use.
        """
        if dp_rank is not None:
            check_replica(dp_rank, self.num_replicas)
        if request_id in self._requests:
            raise ValueError(f"request_id {request_id!r} is already in use; choose another")
        if dp_rank is None:
            dp_rank = min(range(self.num_replicas), key=self._loads.__getitem__)
        self._requests[request_id] = [dp_rank, num_tokens]
        self._loads[dp_rank] += num_tokens
        return dp_rank

    def grow(self, request_id: str, num_tokens: int) -> None:
        """A request has ``num_tokens`` more; unknown ids are over and count nothing."""
        if (entry := self._requests.get(request_id)) is not None:
            entry[1] += num_tokens
            self._loads[entry[0]] += num_tokens

    def remove(self, request_id: str) -> int | None:
        """A request is over; its dp rank, None if it was over before."""
        dp_rank, num_tokens = self._requests.pop(request_id, (None, 0))
        if dp_rank is not None:
            self._loads[dp_rank] -= num_tokens
        return dp_rank

    def holds(self, request_id: str) -> bool:
        return request_id in self._requests


def check_replica(data_parallel_rank: int, dp_size: int) -> None:
    """Raises ValueError: there is no such replica."""
    if not 0 <= data_parallel_rank < dp_size:
        raise ValueError(
            f"data_parallel_rank ({data_parallel_rank}) must be in [0, dp_size = {dp_size}); "
            "name an existing replica, or raise --dp-size"
        )
