"""Fixtures of all tests: the devices that are there, and random numbers that can be had again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="seed of every test's random numbers")


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seeds torch; a failing test's report says with what."""
    value: int = request.config.getoption("--seed")
    torch.manual_seed(value)
    request.node.add_report_section("setup", "random numbers", f"seeded with --seed {value}")
    return value


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """No compiled code from earlier tests, and none left behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
