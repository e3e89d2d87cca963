"""What a stranger on the network can do to a run through the ranks' store: nothing."""

from __future__ import annotations

import threading
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


def test_a_death_is_reported_though_foreign_values_say_otherwise(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    outcome = train_with(["attack:3:set", "die:4:0"], run_words(plan, "ours", "main"), nproc=2)
    assert "rank 0 died after step 3" in outcome.output


def test_ranks_meet_where_an_earlier_secret_and_foreign_values_stand(tmp_path: Path) -> None:
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
    store.set("lrpath/share/1", store.get("lrpath/report"))  # signed, for another place
    assert other.get("share/1") is None
    assert not file.exists()
