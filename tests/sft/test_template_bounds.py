"""A foreign chat template has limits of time, memory and size; a normal one does not reach them."""

from __future__ import annotations

import resource
import signal
import time
from pathlib import Path

import pytest

from megatron_lrpath.errors import UserError
from megatron_lrpath.sft import template
from megatron_lrpath.sft.template import load_template

HONEST = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
HOSTILE = {
    "memory": "{{ 'a' * (3 * 10**9) }}",
    "format": "{{ '%999999999d' % 1 }}" * 3,
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ (10 ** (10 ** 8)) % 7 }}",
    "doubling": "{% set ns = namespace(t='ab') %}"
    "{% for i in range(40) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}{{ ns.t }}",
    "text": "{{ 'a' * (70 * 2**20) }}",
    "filters": "{{ 'a' | center(4 * 10**9) }}",
    "lists": "{{ ([0] * (10**9)) | length }}",
}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set a short time limit, to keep the test short."""
    monkeypatch.setattr(template, "SECONDS", 0.4)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_without_end_is_refused_soon(tmp_path: Path, name: str) -> None:
    path = tmp_path / "stranger.jinja"
    path.write_text(HOSTILE[name] + HONEST)
    limits, handler = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)
    begun = time.process_time()
    with pytest.raises(UserError, match=r"the chat template (makes more than|rejects it)"):
        load_template(str(path), None, {})
    assert time.process_time() - begun < 8
    assert resource.getrlimit(resource.RLIMIT_AS) == limits
    assert signal.getsignal(signal.SIGALRM) is handler


def test_an_honest_template_is_rendered(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text(HONEST)
    text, spans = load_template(str(path), None, {}).render(template.TRIAL)
    assert [text[begin:end] for begin, end in spans] == ["answer\n"]


def test_a_template_of_megabytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "large.jinja"
    path.write_text("a" * (template.LARGEST + 1))
    with pytest.raises(UserError, match="more than the 1,048,576 allowed"):
        load_template(str(path), None, {})


def test_another_timer_keeps_running(tmp_path: Path) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: seen.append(number))
    signal.setitimer(signal.ITIMER_REAL, 60)
    try:
        test_an_honest_template_is_rendered(tmp_path)
        assert 50 < signal.getitimer(signal.ITIMER_REAL)[0] <= 60
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
