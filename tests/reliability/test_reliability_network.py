"""An attacker on the network cannot affect a run through the ranks' store."""

from __future__ import annotations

import os
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest

from tests.support.faults import train_with
from tests.support.training_fixtures import make_plan, run_words

PATIENCE = timedelta(seconds=60)


@pytest.mark.parametrize("kind", ["set", "delete", "add"])
def test_foreign_values_change_nothing(tmp_path: Path, kind: str) -> None:
    plan = make_plan(tmp_path)
    outcome = train_with([f"attack:3:{kind}"], run_words(plan, "ours", "main"), nproc=2).ok()
    assert f"attacked: {kind}" in outcome.output
    assert not list(tmp_path.rglob(".rendezvous-*"))


def test_a_death_is_reported_despite_contradicting_foreign_values(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    outcome = train_with(["attack:3:set", "die:4:0"], run_words(plan, "ours", "main"), nproc=2)
    assert "rank 0 died after step 3" in outcome.output


def test_ranks_meet_despite_an_earlier_secret_and_foreign_values(tmp_path: Path) -> None:
    from torch.distributed import HashStore

    from megatron_lrpath.training.guards.channel import Channel, meet, secret_file

    store, file = HashStore(), secret_file(tmp_path, "host:1")
    file.write_bytes(b"an earlier start's")
    for key in ("met", "here/1", "share/1"):
        Channel(store, b"stranger").put(key, ["x"])
    found: dict[int, Channel | None] = {}
    threads = [
        threading.Thread(target=lambda rank=rank: found.update({rank: meet(store, rank, 2, file, PATIENCE)}))
        for rank in (1, 0)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    one, other = found[0], found[1]
    assert one is not None
    assert other is not None
    assert other.get("share/1") is None
    one.put("share/1", {"start": 7})
    store.delete_key("lrpath/share/1")
    one.restore()
    assert other.wait(["share/1"], PATIENCE) == [{"start": 7}]
    store.set("lrpath/report", "rubbish")
    assert [other.claim("report", 1), one.claim("report", 0)] == [1, 1]
    store.set("lrpath/share/1", store.get("lrpath/report"))  # signed, for another key
    assert other.get("share/1") is None
    assert not file.exists()


def test_the_secret_is_for_the_user_alone_and_new_at_each_start(tmp_path: Path) -> None:
    from torch.distributed import HashStore

    from megatron_lrpath.training.guards.channel import meet, secret_file

    file, seen = secret_file(tmp_path, "host:1"), set()
    mask = os.umask(0)
    try:
        for _ in range(2):
            waiting = threading.Thread(target=meet, args=(HashStore(), 0, 2, file, timedelta(seconds=2)))
            waiting.start()
            while not file.exists() and waiting.is_alive():
                time.sleep(0.01)
            assert file.stat().st_mode & 0o777 == 0o600
            seen.add(file.read_bytes())
            waiting.join()
            assert not list(tmp_path.iterdir())
    finally:
        os.umask(mask)
    assert len(seen) == 2
    assert min(map(len, seen)) >= 32


def test_an_end_without_a_reason_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch.distributed import HashStore

    from megatron_lrpath.training.guards import peers
    from megatron_lrpath.training.guards.channel import Channel

    monkeypatch.setattr(peers, "SETTLE_SECONDS", 0.05)
    store, found = HashStore(), {}

    def watch(rank: int) -> None:
        found[rank] = peers.PeerWatch(peers.Ranks(rank, 2, store, Channel(store, b"secret")))

    threads = [threading.Thread(target=watch, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0].claim()  # and then the file is removed
    found[1]._see_reason(0)
    assert "rank 0 ended the run before the first step and gave no reason" in capsys.readouterr().err
    found[0].leave()
    found[1]._see_reason(0)
    assert capsys.readouterr().err == ""
