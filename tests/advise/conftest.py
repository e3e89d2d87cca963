"""Fixture of the tests of the advice: a trained plan."""

from __future__ import annotations

import pytest

from megatron_lrpath.plan import Plan
from tests.support.advise_fixtures import small_plan, write_losses


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Return a plan whose runs have the losses of a known law."""
    plan = small_plan(tmp_path_factory.mktemp("trained"))
    write_losses(plan)
    return plan
