"""`--set KEY=VALUE`: dotted keys, YAML values, the places of errors, and text valid in any folder."""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_lrpath.errors import PlanError
from megatron_lrpath.plan import load_plan
from megatron_lrpath.plan.file.overrides import change, changed_plan, read_words
from megatron_lrpath.plan.file.source import parse_source, plain, plan_text
from tests.support.plan_text import SOUND, plan_with

PLAN = {
    "model": "tiny",
    "versions": [{"name": "v1", "steps": 5}, {"name": "v2", "steps": 5}],
    "prompts": ["a"],
}


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("seed", 3, {"seed": 3}),
        ("schedule.max_lr", 0.1, {"schedule": {"max_lr": 0.1}}),
        ("versions.steps", 7, {"versions": [{"name": "v1", "steps": 7}, {"name": "v2", "steps": 7}]}),
        (
            "versions[1].alpha",
            0.2,
            {"versions": [PLAN["versions"][0], {"name": "v2", "steps": 5, "alpha": 0.2}]},
        ),
        ("model.num_layers", 2, {"model": {"recipe": "tiny", "num_layers": 2}}),
        ("model", None, {"model": None}),
    ],
)
def test_a_dotted_key_is_followed(key: str, value: Any, expected: dict[str, Any]) -> None:
    plan: dict[str, Any] = copy.deepcopy(PLAN)
    assert change(plan, key, value)
    assert {name: plan.get(name) for name in expected} == expected


def test_an_argument_has_one_value_however_it_is_spelt() -> None:
    plan = {"megatron": {"save-interval": 5}}
    change(plan, "megatron.save_interval", 9)
    assert plan == {"megatron": {"save-interval": 9}}


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("versions[2].steps", "has only 2 entries"),
        ("model[0].x", "is no list"),
        ("prompts.x", "'prompts' is 'a' there, not a mapping"),
        ("versions.steps.x", "'steps' is 5 there"),
        ("a..b", "is no key"),
    ],
)
def test_a_key_that_cannot_be_followed_is_refused(key: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        change(copy.deepcopy(PLAN), key, 1)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("'1e-3'", "1e-3"),
        ("[ours, cpt]", ["ours", "cpt"]),
        ("{a: true}", {"a": True}),
        ("", None),
    ],
)
def test_values_are_yaml_as_in_a_plan(text: str, value: Any) -> None:
    assert read_words([f"a.b={text}"]) == {"a.b": value}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["schedule.max_rl=1"], "--set schedule.max_rl: unknown key (did you mean 'max_lr'?)"),
        (["schedul.max_lr=1"], "--set schedul: unknown key (did you mean 'schedule'?)"),
        (["schedule.max_lr=fast"], "--set schedule.max_lr: must be a number, not 'fast'"),
        (["schedule.min_rl="], "(did you mean 'schedule.min_lr'?)"),
        (["schedule.max_lr=null"], "the key 'max_lr' is missing"),
        (["versions[1].steps=0"], "--set versions[1].steps: must be at least 1"),
        (["seed=true"], "--set seed: must be a whole number"),
        (["alpha"], "write it like --set schedule.max_lr=1e-3"),
        (["alpha=0.5", "alpha=0.6"], "--set alpha: given twice"),
        (["alpha=[0.5"], "this is not YAML"),
        (["name=a\nb"], "has several lines"),
        (["output=*x"], "the alias *x is not read"),
        (["model.num_layers=none"], "--set model.num_layers: "),
        (["megatron.lgo_interval=5"], "--set megatron.lgo_interval: Megatron has no argument"),
        (["batch.micro_batch_size=5"], ":7: batch.global_batch_size: 32 is not a multiple"),
    ],
)
def test_a_value_that_a_plan_cannot_have_is_refused_where_it_was_given(
    tmp_path: Path, argv: list[str], said: str
) -> None:
    (tmp_path / "plan.yaml").write_text(SOUND.replace("model: tiny", "model: {recipe: tiny}"))
    with pytest.raises(PlanError) as error:
        changed_plan(tmp_path / "plan.yaml", argv)
    assert said in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "1e-3",
        "0.5",
        "12",
        "yes",
        "~",
        "null",
        "*x",
        "a: b",
        "- a",
        "# a",
        "é",
        "two\nlines",
        " x",
        "",
        "<<",
        "=",
    ],
)
def test_a_text_is_written_so_that_it_is_read_again(text: str) -> None:
    shared = {"text": text, "numbers": [1, 1e-5, 0.6, True, None]}
    values = {"one": shared, "two": shared, text or "x": [text]}
    assert plain(parse_source(Path("x"), plan_text(values)).root) == values


def test_the_text_is_valid_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/tokenizer.model").touch()
    plan_with(
        tmp_path,
        branch_mix={"slices": {"curated": 0.1, "more/chat": 0.1}},
        sft={
            "data": ["chats/*.jsonl"],
            "valid": 0.1,
            "max_lr": 1e-5,
            "steps": 5,
            "chat_template": "own.jinja",
        },
        megatron={"wandb-save-dir": "logs", "log-interval": 5, "vocab_file": str(tmp_path / "v.json")},
    )
    made = changed_plan(Path("plan.yaml"), ["data.valid=[data/slices/valid, more/valid-v2]", "output=runs/x"])
    Path("elsewhere.yaml").write_text(made.text)
    monkeypatch.chdir("/")
    plan, here = load_plan(tmp_path / "elsewhere.yaml"), str(tmp_path)
    assert plan.tokenizer.model == f"{here}/data/tokenizer.model"
    assert (plan.data.slices, plan.data.valid) == (f"{here}/data/slices", f"{here}/data/slices/valid")
    assert plan.data.more_valid == (f"{here}/more/valid-v2",)
    assert plan.versions[0].mix is not None
    assert [part.slice for part in plan.versions[0].mix.parts] == ["curated", f"{here}/more/chat"]
    assert plan.sft is not None
    assert (plan.sft.data, plan.sft.template) == ((f"{here}/chats/*.jsonl",), f"{here}/own.jinja")
    assert plan.megatron["wandb_save_dir"] == f"{here}/logs"
    assert plan.output == made.plan.output == os.path.join(here, "runs/x")


def test_a_name_of_hugging_face_stays_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan_with(tmp_path, tokenizer={"type": "HuggingFaceTokenizer", "model": "org/model"})
    assert "model: org/model" in changed_plan(Path("plan.yaml"), ["seed=2"]).text
