"""The engine's tests run on every device there is: on a CPU always, on a card with ``-m cuda``."""

import pytest


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name
