"""Every test of kernels begins with the same random numbers."""

import pytest
import torch
from backends import BACKENDS, BackendCase, make_case


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=BACKENDS)
def case(request: pytest.FixtureRequest) -> BackendCase:
    return make_case(request.param)
