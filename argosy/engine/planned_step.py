"""A step between ``schedule`` and ``update``: who computes what in it, and whose blocks it may still write.

It decides nothing; the scheduler keeps these in order, oldest first. Invariant: of one request, a step goes on exactly
where the step before it ends.
"""

from collections.abc import Iterable

from argosy.engine.request import Request, RequestStatus
from argosy.messages import ScheduledBatch


class PlannedStep:
    """One plan that is carried out now, or will be next. A dataclass would take as long to make as a short plan."""

    __slots__ = ("batch", "held", "num_plain_decodes", "requests")

    def __init__(self, batch: ScheduledBatch) -> None:
        self.batch = batch
        self.requests: list[Request] = []  # parallel to the batch's rows
        self.num_plain_decodes = 0  # leading entries that compute one token and no draft, and sample the next
        self.held: list[Request] = []  # ended meanwhile: blocks and row are theirs until the update

    def add(self, request: Request, num_new_tokens: int) -> None:
        """The request's next ``num_new_tokens`` tokens are this step's work."""
        self.requests.append(request)
        self.batch.rows.append(request.row)
        self.batch.num_computed_tokens.append(request.num_computed_tokens)
        self.batch.num_scheduled_tokens.append(num_new_tokens)
        request.num_computed_tokens += num_new_tokens


def check_order(steps: Iterable[PlannedStep], running: Iterable[Request]) -> None:
    """Assert the invariant, and that each request stands where its last step ends. For tests."""
    ends: dict[int, int] = {}
    for step in steps:
        batch = step.batch
        entries = zip(step.requests, batch.rows, batch.num_computed_tokens, batch.num_scheduled_tokens, strict=True)
        for request, row, start, num_new_tokens in entries:
            if request.status is RequestStatus.RUNNING:
                goes_on = start == ends[id(request)] if id(request) in ends else start < request.num_tokens
                assert goes_on and row == request.row, f"step {batch.step}: row {row} from {start} of {request!r}"
                ends[id(request)] = start + num_new_tokens
    for request in running:
        num_computed = request.num_computed_tokens
        is_right = num_computed == ends[id(request)] if id(request) in ends else num_computed < request.num_tokens
        assert is_right, f"{request!r} is not where its last step ends: {ends.get(id(request))}"
