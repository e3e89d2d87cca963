"""Settings of every test: one thread per process, the slowest files first, and `--fast`."""

from __future__ import annotations

import gc
import multiprocessing.process
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import settings

STARTS = ((subprocess.Popen, "__init__"), (multiprocessing.process.BaseProcess, "start"), (os, "fork"))
WAITING = (
    "test_slurm_training", "test_reliability_kills", "test_slurm_jobs", "test_slurm_signals", "test_downstream",
    "test_warm", "test_reliability_flips", "test_slurm_experiment",
)  # fmt: skip

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

settings.register_profile("busy", deadline=None)  # on a busy machine durations have no meaning
settings.load_profile("busy")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option `--fast`: only tests that need a single process."""
    parser.addoption("--fast", action="store_true", help="skip every test that starts a process")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Skip a test with `--fast` when it, or a fixture of it, starts a process."""
    if not item.config.getoption("--fast"):
        return (yield)

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in STARTS:
            patch.setattr(owner, name, skipping(getattr(owner, name)))
        return (yield)


def skipping(start: Callable[..., Any]) -> Callable[..., Any]:
    """Return `start` with a skip of the test, except during an import, when torch may start a process."""

    def skip_or_start(*args: Any, **kwargs: Any) -> Any:
        frame = sys._getframe()
        while frame := frame.f_back:
            if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
                return start(*args, **kwargs)
        pytest.skip("starts a process")

    return skip_or_start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests that wait longest first, so that the other worker is not idle at the end."""
    place = {name: number for number, name in enumerate(WAITING)}
    items.sort(key=lambda item: place.get(item.path.stem, len(WAITING)))


def pytest_collection_finish() -> None:
    """Exclude the imported objects from garbage collections: they live as long as this process."""
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def torch_is_left_as_it_was() -> Iterator[None]:
    """Fail if a module leaves the CPU's backend installed in this process: other tests would use it."""
    yield
    if torch := sys.modules.get("torch"):
        assert not torch.compile.__module__.startswith("megatron_lrpath"), (
            "activate it in a process of its own"
        )
