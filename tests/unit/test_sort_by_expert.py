"""Sorting rows by expert: the fast twin on a CPU against the specification."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from argosy.distributed.ep_local import sort_by_expert, sort_by_expert_on_host

NUM_EXPERTS = 6


@given(st.lists(st.integers(0, NUM_EXPERTS - 1), max_size=40))
def test_twins_are_equal(ids: list[int]) -> None:
    routed_ids = torch.tensor(ids, dtype=torch.int32)
    slow, fast = sort_by_expert(routed_ids, NUM_EXPERTS), sort_by_expert_on_host(routed_ids, NUM_EXPERTS)
    for expected, found in zip(slow, fast, strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    order, inverse, counts = fast
    assert torch.equal(order[inverse], torch.arange(len(ids)))
    assert routed_ids[order].tolist() == sorted(ids)
    assert counts.tolist() == [ids.count(expert) for expert in range(NUM_EXPERTS)]
