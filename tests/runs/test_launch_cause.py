"""The cause of a failure is found in torchrun's logs."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_lrpath.runs.failure import find_cause

TORCHRUN = """\
W1123 16:42:03.053000 8392 torch/distributed/elastic/multiprocessing/api.py:1028] Sending process 8475 closing
E1123 16:42:03.119000 8392 torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: {code})
Traceback (most recent call last):
  File "<frozen runpy>", line 198, in _run_module_as_main
    raise ChildFailedError(
torch.distributed.elastic.multiprocessing.errors.ChildFailedError: 
============================================================
t.py FAILED
------------------------------------------------------------
Failures:
[1]:
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 8475)  (SIGTERM)
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-23_16:42:03
  host      : localhost
  rank      : {rank} (local_rank: {rank})
  exitcode  : {code} (pid: 8476) 
============================================================
"""
CLOSED = """\
[rank0]: Traceback (most recent call last):
[rank0]:   File "/tmp/t.py", line 10, in <module>
[rank0]:     d.all_reduce(torch.ones(1))
[rank0]: RuntimeError: [pair.cc:561] Connection closed by peer [127.0.0.1]:17324. This is typically
"""
CHAINED = """\
[rank1]: Traceback (most recent call last):
[rank1]:   File "/tmp/t.py", line 8, in <module>
[rank1]: KeyError: 'first'

[rank1]: The above exception was the direct cause of the following exception:

[rank1]: Traceback (most recent call last):
[rank1]:   File "/tmp/t.py", line 9, in <module>
[rank1]: RuntimeError: bad
[rank1]: thing
"""
PLAIN = """\
Traceback (most recent call last):
  File "/tmp/t.py", line 9, in <module>
    assert args.vocab_size
AssertionError
"""


def cause(tmp_path: Path, *parts: str, rank: int = 1, code: int = 1) -> str | None:
    log = tmp_path / "a.log"
    log.write_text("".join(parts) + TORCHRUN.format(rank=rank, code=code))
    return find_cause(log)


@pytest.mark.parametrize("parts", [(CHAINED, CLOSED), (CLOSED, CHAINED)])
def test_the_failing_ranks_last_exception_is_the_cause_in_any_order(tmp_path, parts):
    assert cause(tmp_path, *parts) == "RuntimeError: bad"


def test_our_own_message_comes_before_any_exception(tmp_path):
    said = "lrpath: error: slice v2 has 5 tokens, 10 are needed\n"
    assert cause(tmp_path, said, CHAINED, CLOSED) == "slice v2 has 5 tokens, 10 are needed"


def test_an_unknown_argument_is_the_parsers_message(tmp_path):
    said = "usage: pretrain.py [-h]\npretrain.py: error: unrecognized arguments: --lgo-interval 5\n"
    assert cause(tmp_path, said, code=2) == "unrecognized arguments: --lgo-interval 5"


def test_a_killed_rank_is_named_not_its_neighbours_complaint(tmp_path):
    assert cause(tmp_path, CLOSED, code=-9) == "rank 1 was killed by SIGKILL, perhaps for want of memory"


def test_an_exception_without_rank_or_text(tmp_path):
    assert cause(tmp_path, PLAIN, rank=0) == "AssertionError"


def test_only_the_exit_code_is_known(tmp_path):
    assert cause(tmp_path, "some output\n", rank=0, code=3) == "rank 0 exited with status 3"


def test_no_log_no_cause(tmp_path):
    assert find_cause(tmp_path / "missing.log") is None


def test_the_cause_is_at_the_end_of_a_long_log_with_bad_bytes(tmp_path):
    log = tmp_path / "a.log"
    log.write_bytes(b"\xff\xfe noise\n" * 1_000_000 + PLAIN.replace("Error", "Error: no").encode())
    assert find_cause(log) == "AssertionError: no"
