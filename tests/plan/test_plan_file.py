"""The plan file: its values are read, and errors in it are reported with line and key."""

import math
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_lrpath.errors import PlanError
from megatron_lrpath.models import ModelSpec
from megatron_lrpath.plan import json_schema, load_plan
from megatron_lrpath.plan.file.keys import (
    BATCH_KEYS,
    DATA_KEYS,
    MIX_KEYS,
    PLAN_KEYS,
    SCHEDULE_KEYS,
    SFT_KEYS,
    TOKENIZER_KEYS,
    VERSION_KEYS,
)
from tests.support import ROOT
from tests.support.plan_text import SOUND, plan_with, versions


def refusal(folder: Path, text: str | bytes) -> str:
    """Return the message with which a plan is refused, without the file's folder."""
    path = folder / "plan.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(PlanError) as caught:
        load_plan(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    return message.removeprefix(str(folder) + "/")


def test_a_plan_is_read_as_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(SOUND)
    plan = load_plan(tmp_path / "plan.yaml")
    assert (plan.name, plan.seed, plan.model) == ("quickstart", 1234, ModelSpec("tiny", {}))
    assert (plan.schedule.style, plan.schedule.max_lr, plan.schedule.min_lr) == ("cosine", 1e-3, 1e-4)
    assert (plan.schedule.warmup, plan.alpha, plan.cpt_variant) == (20, 0.6, "reset-max")
    assert (plan.batch.global_batch_size, plan.batch.micro_batch_size, plan.batch.seq_length) == (32, 8, 256)
    assert (plan.batch.tokens, plan.batch.rampup) == (8192, None)
    assert (plan.tokenizer.type, plan.tokenizer.model) == ("SentencePieceTokenizer", "data/tokenizer.model")
    assert (plan.data.slices, plan.data.valid) == ("data/slices", "data/slices/valid")
    assert [(version.name, version.steps) for version in plan.versions] == [("v1", 100), ("v2", 100)]
    assert (plan.output, plan.megatron, plan.path.parent) == ("runs/quickstart", {}, tmp_path)


def test_defaults(tmp_path: Path) -> None:
    plan = plan_with(
        tmp_path,
        seed=None,
        alpha=None,
        cpt_variant=None,
        output=None,
        schedule={"min_lr": None, "warmup_steps": None},
        data={"valid": None},
    )
    assert (plan.seed, plan.alpha, plan.cpt_variant, plan.output) == (
        1234,
        0.6,
        "reset-max",
        "runs/quickstart",
    )
    assert (plan.schedule.min_lr, plan.schedule.warmup) == (1e-4, 0)
    assert plan.schedule.knee_explore == 0.5
    assert plan.schedule.multi_step_fractions == (0.8, 0.9)
    assert (plan.schedule.wsd_decay_fraction, plan.schedule.wsd_decay_shape) == (0.1, "linear")
    assert plan.data.valid == "data/slices/valid"


@pytest.mark.parametrize(
    ("written", "value"),
    [("1e-3", 1e-3), ("1E-3", 1e-3), (".001", 1e-3), ("0.001", 1e-3), ("1.0e-03", 1e-3), ("1", 1.0)],
)
def test_rates_may_be_written_in_every_usual_way(tmp_path: Path, written: str, value: float) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(SOUND.replace("1.0e-3", written))
    assert load_plan(path).schedule.max_lr == value


@pytest.mark.parametrize(
    ("written", "value"), [("100", 100), ("1_000", 1000), ("1e4", 10_000), ("200.0", 200)]
)
def test_steps_may_be_written_in_every_usual_way(tmp_path: Path, written: str, value: int) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(SOUND.replace("v2, steps: 100", f"v2, steps: {written}"))
    steps = load_plan(path).versions[1].steps
    assert (steps, type(steps)) == (value, int)


def test_a_model_is_a_recipe_with_arguments_on_top(tmp_path: Path) -> None:
    plan = plan_with(tmp_path, model={"recipe": "tiny", "num-layers": 6, "swiglu": False})
    assert plan.model == ModelSpec("tiny", {"num_layers": 6, "swiglu": False})


def test_megatron_arguments_take_dashes_and_underscores(tmp_path: Path) -> None:
    values = {
        "bf16": True,
        "save-interval": 10,
        "adam_beta2": 0.95,
        "recompute-modules": ["mlp", "core_attn"],
    }
    plan = plan_with(tmp_path, megatron=values)
    assert plan.megatron == {name.replace("-", "_"): value for name, value in values.items()}


def test_cycle_steps_of_the_schedule_are_the_versions_default(tmp_path: Path) -> None:
    plan = plan_with(
        tmp_path,
        schedule={"cycle_steps": 400},
        versions=[{"name": "v1", "steps": 100, "cycle_steps": math.inf}, {"name": "v2", "steps": 100}],
    )
    assert plan.versions[0].cycle_steps == {"scratch": math.inf, "continual": math.inf, "branch": math.inf}
    assert plan.versions[1].cycle_steps == {"scratch": 400, "continual": 400, "branch": 400}


@pytest.mark.parametrize("written", ["inf", ".inf"])
def test_a_cycle_for_one_kind_of_run_alone(tmp_path: Path, written: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(
        SOUND.replace("v2, steps: 100", f"v2, steps: 100, cycle_steps: {{continual: 150, branch: {written}}}")
    )
    assert load_plan(path).versions[1].cycle_steps == {"continual": 150, "branch": math.inf}


REFUSED = [
    # old text, new text, the line and key of the message, a part of the message
    ("alpha: 0.6", "alpha: 0", "5: alpha", "above 0 and at most 1"),
    ("alpha: 0.6", "alpha: 1.01", "5: alpha", "above 0 and at most 1, not 1.01"),
    ("alpha: 0.6", "alpha: -0.5", "5: alpha", "above 0"),
    ("alpha: 0.6", "alpha: .nan", "5: alpha", "finite"),
    ("alpha: 0.6", "alpha: '0.6'", "5: alpha", "must be a number, not '0.6'"),
    ("alpha: 0.6", "alpha: yes", "5: alpha", "must be a number, not true"),
    ("alpha: 0.6", "alpha: [0.6]", "5: alpha", "must be a number, not a list"),
    ("alpha: 0.6", "alpha: 0.004", "5: alpha", "round(0.004 · 100) = 0 steps"),
    ("alpha: 0.6", "alpha: 0.81", "5: alpha", "at step 19, inside its warm-up of 20"),
    ("alpha: 0.6", "alpha: 1", "5: alpha", "at step 0, inside its warm-up"),
    ("alpha: 0.6", "alhpa: 0.6", "5: alhpa", "did you mean 'alpha'?"),
    (
        "seed: 1234",
        "seed: 1\nmegatron: {save_interval: 48, save_retain_interval: 195}",
        "3: megatron.save_retain_interval",
        "195 is not a multiple of save_interval 48; give 192",
    ),
    (
        "seed: 1234",
        "seed: 1\nmegatron: {save_retain_interval: 99}",
        "3: megatron.save_retain_interval",
        "save_interval 500; give 500",
    ),
    ("seed: 1234", "seed: 0", "2: seed", "at least 1"),
    ("seed: 1234", "seed: 1.5", "2: seed", "whole number"),
    ("seed: 1234", "seed: " + "9" * 5000, "2: seed", "must be a whole number"),
    ("seed: 1234", "seed: 010", "2: seed", "whole number, not '010'"),
    ("seed: 1234", "seed: 1\nseed: 2", "3: seed", "given twice, first in line 2"),
    ("model: tiny", "model: tyni", "3: model", "did you mean 'tiny'?"),
    ("model: tiny", "model: {recipe: tyni}", "3: model.recipe", "did you mean 'tiny'?"),
    ("model: tiny", "model: {num_layers: 2}", "3: model", "requires hidden_size, num_attention_heads"),
    ("model: tiny", "model: {recipe: tiny, lr: 1}", "3: model.lr", "set `schedule.max_lr`"),
    ("model: tiny", "model: {recipe: tiny, --num-layers: 1}", "3: model.--num-layers", "without the dashes"),
    ("model: tiny", "model: {num-layers: 1, num_layers: 1}", "3: model.num_layers", "given twice"),
    ("model: tiny", "model: {recipe: tiny, spec: {a: b}}", "3: model.spec", "not a mapping"),
    (
        "model: tiny",
        "model: {recipe: tiny, num-attention-heads: 3}",
        "3: model.num-attention-heads",
        "hidden_size 128 is not a multiple of num_attention_heads 3",
    ),
    (
        "model: tiny",
        "model: {recipe: tiny, group_query_attention: true, num_query_groups: 3}",
        "3: model.num_query_groups",
        "num_attention_heads 4 is not a multiple of num_query_groups 3",
    ),
    (
        "model: tiny",
        "model: {recipe: tiny, max_position_embeddings: 100}",
        "3: model.max_position_embeddings",
        "fewer than batch.seq_length 256",
    ),
    ("seed: 1234", "megatron: {bf16: true, fp16: true}", "2: megatron.fp16", "one precision"),
    (
        "seed: 1234",
        "megatron: {tensor-model-parallel-size: 3}",
        "2: megatron.tensor-model-parallel-size",
        "3 ranks do not divide num_attention_heads 4",
    ),
    (
        "seed: 1234",
        "megatron: {pipeline-model-parallel-size: 3}",
        "2: megatron.pipeline-model-parallel-size",
        "3 stages do not divide num_layers 4",
    ),
    (
        "seed: 1234",
        "megatron: {context_parallel_size: 3}",
        "2: megatron.context_parallel_size",
        "batch.seq_length 256 is not a multiple of 6",
    ),
    (
        "seed: 1234",
        "megatron: {num_experts: 4, expert_model_parallel_size: 3}",
        "2: megatron.expert_model_parallel_size",
        "3 ranks do not divide num_experts 4",
    ),
    (
        "seed: 1234",
        "megatron: {recompute_granularity: full, recompute_num_layers: 1}",
        "2: megatron.recompute_granularity",
        "`full` needs recompute_method as well",
    ),
    ("model: tiny", "model: {recipe: tiny, openai_gelu: true}", "3: model.openai_gelu", "no longer reads it"),
    (
        "model: tiny",
        "model: {recipe: tiny, position_embedding_type: relative}",
        "3: model.position_embedding_type",
        "a GPT would be built without positions",
    ),
    ("model: tiny", "model:", "3: model", "'model' is missing"),
    ("style: cosine", "style: cosin", "4: schedule.style", "did you mean 'cosine'?"),
    ("style: cosine", "style: 5", "4: schedule.style", "must be text, not 5; put it in quotes"),
    ("style: cosine, ", "", "4: schedule", "the key 'style' is missing"),
    ("1.0e-3", ".inf", "4: schedule.max_lr", "finite"),
    ("1.0e-3", "0", "4: schedule.max_lr", "above 0"),
    ("1.0e-3", "1.0e-5", "4: schedule.min_lr", "0.0001 is above max_lr 1e-05"),
    ("1.0e-4", "-1.0", "4: schedule.min_lr", "at least 0"),
    ("warmup_steps: 20", "warmup_steps: -1", "4: schedule.warmup_steps", "at least 0"),
    (
        "warmup_steps: 20",
        "warmup_steps: 100",
        "4: schedule.warmup_steps",
        "fills all 100 steps of scratch-v1",
    ),
    ("warmup_steps: 20", "warmup: 20", "4: schedule.warmup", "did you mean 'warmup_steps'?"),
    ("warmup_steps: 20", "knee_explore: 1", "4: schedule.knee_explore", "below 1"),
    ("warmup_steps: 20", "multi_step_fractions: [0.9, 0.8]", "4: schedule.multi_step_fractions", "ascend"),
    ("warmup_steps: 20", "multi_step_fractions: [0.9]", "4: schedule.multi_step_fractions", "a list of 2"),
    ("warmup_steps: 20", "multi_step_fractions: [0.5, x]", "4: schedule.multi_step_fractions[1]", "a number"),
    (
        "warmup_steps: 20",
        "wsd_decay_shape: sqrt",
        "4: schedule.wsd_decay_shape",
        "did you mean 'minus-sqrt'?",
    ),
    (
        "warmup_steps: 20",
        "cycle_steps: 150",
        "4: schedule.cycle_steps",
        "shorter than scratch-v2 with its 200",
    ),
    ("warmup_steps: 20", "cycle_steps: {brunch: 9}", "4: schedule.cycle_steps.brunch", "mean 'branch'?"),
    ("warmup_steps: 20", "cycle_steps: {branch: 9}", "4: schedule.cycle_steps.branch", "at least 60"),
    ("warmup_steps: 20", "cycle_steps: long", "4: schedule.cycle_steps", "whole number, not 'long'"),
    ("schedule: {", "schedule: [{", "5", "not YAML"),
    ("cpt_variant: reset-max", "cpt_variant: resetmax", "6: cpt_variant", "did you mean 'reset-max'?"),
    (
        "global_batch_size: 32",
        "global_batch_size: 30",
        "7: batch.global_batch_size",
        "not a multiple of micro",
    ),
    ("global_batch_size: 32, ", "", "7: batch", "'global_batch_size' is missing"),
    ("batch: {", "batch: 5 #", "7: batch", "must be a mapping"),
    ("seq_length: 256", "seq_length: 0", "7: batch.seq_length", "at least 1"),
    ("type: SentencePieceTokenizer", "type: SentencePiece", "8: tokenizer.type", "SentencePieceTokenizer'?"),
    (", model: data/tokenizer.model", "", "8: tokenizer", "needs its model"),
    ("SentencePieceTokenizer", "NullTokenizer", "8: tokenizer", "give vocab_size"),
    ("slices: data/slices", "slices: ''", "9: data.slices", "must not be empty"),
    ("slices: data/slices", f"slices: {'x/' * 2000}y", "9: data.slices", "leave room for the files"),
    (
        "valid: data/slices/valid",
        "valid: ./data//slices/v2",
        "12: versions[1].name",
        "is the validation slice",
    ),
    ("name: v2", "name: v1", "12: versions[1].name", "the name of version 1 already"),
    ("name: v2", "name: V1", "12: versions[1].name", "the name of version 1 already"),
    ("name: v2", "name: v0", "12: versions[1].name", "versions out of order"),
    ("name: v2", "name: v01", "12: versions[1].name", "versions out of order"),
    ("name: v2", "name: 2.10", "12: versions[1].name", "put it in quotes"),
    ("name: v2", "name: ''", "12: versions[1].name", "cannot name a folder"),
    ("name: v2", "name: ../v2", "12: versions[1].name", "cannot name a folder"),
    ("name: v2", "name: a/b", "12: versions[1].name", "cannot name a folder"),
    ("name: v2", "name: ..", "12: versions[1].name", "cannot name a folder"),
    ("name: v2", "name: .v2", "12: versions[1].name", "cannot name a folder"),
    ("name: v2", "name: -v2", "12: versions[1].name", "cannot name a folder"),
    ("name: v2", "name: 'v2\n'", "12: versions[1].name", "cannot name a folder"),
    ("name: v2", "name: vé", "12: versions[1].name", "cannot name a folder"),
    ("name: v2, ", "", "12: versions[1]", "'name' is missing"),
    ("v2, steps: 100", "v2, steps: 0", "12: versions[1].steps", "at least 1"),
    ("v2, steps: 100", "v2, steps: -5", "12: versions[1].steps", "at least 1"),
    ("v2, steps: 100", "v2, steps: 10.5", "12: versions[1].steps", "whole number, not 10.5"),
    ("v2, steps: 100", "v2, steps: 1e30", "12: versions[1].steps", "at most 1000000000"),
    ("v2, steps: 100", "v2, steps: 1:30", "12: versions[1].steps", "whole number, not '1:30'"),
    ("v2, steps: 100", "v2, setps: 100", "12: versions[1].setps", "did you mean 'steps'?"),
    ("v2, steps: 100", "v2, steps: 100, alpha: 2000", "12: versions[1].alpha", "at most 1"),
    ("v2, steps: 100", "v2, steps: 100, alpha: 0.001", "12: versions[1].alpha", "= 0 steps"),
    ("v1, steps: 100", "v1, steps: 100, alpha: 0.9", "11: versions[0].alpha", "inside its warm-up"),
    ("v2, steps: 100", "v2, steps: 100, cycle_steps: 9", "12: versions[1].cycle_steps", "shorter"),
    (
        "v1, steps: 100",
        "v1, steps: 100, cycle_steps: {continual: 200}",
        "11: versions[0].cycle_steps.continual",
        "give `scratch`",
    ),
    ("  - {name: v1, steps: 100}\n  - {name: v2, steps: 100}\n", "", "10: versions", "'versions' is missing"),
    ("versions:", "versions: []\nversion:", "11: version", "did you mean 'versions'?"),
    ("output: runs/quickstart", "output: 5", "13: output", "must be text"),
    ("output: runs/quickstart", f"output: {'x' * 256}", "13: output", "256 bytes, and 255 is the most"),
    ("output: runs/quickstart", f"output: {'x/' * 2000}y", "13: output", "leave room for the files"),
    ("output: runs/quickstart", "megatron: {lr: 1}", "13: megatron.lr", "set `schedule.max_lr`"),
    ("output: runs/quickstart", "megatron: {train-iters: 1}", "13: megatron.train-iters", "set `versions`"),
    ("output: runs/quickstart", "megatron: {num_layers: 1}", "13: megatron.num_layers", "under `model:`"),
    ("output: runs/quickstart", "megatron: {bf16: }", "13: megatron.bf16", "not empty"),
    ("output: runs/quickstart", "megatron: {clip_grad: .inf}", "13: megatron.clip_grad", "finite"),
    ("output: runs/quickstart", "megatron: 7", "13: megatron", "must be a mapping"),
    ("output: runs/quickstart", "<<: {a: 1}", "13: <<", "unknown key"),
    ("output: runs/quickstart", "output: &here x\nname2: *here", "14", "the alias *here"),
    ("output: runs/quickstart", "output: !!python/name:os.system x", "13", "the tag"),
    ("output: runs/quickstart", "output: {a: {b: {c: {d: {e: {f: {g: {h: 1}}}}}}}}", "13", "levels deep"),
    ("output: runs/quickstart", "? [a]\n: b", "13", "a key must be plain text"),
    ("output: runs/quickstart", "\toutput: x", "13", "not YAML"),
    ("output: runs/quickstart", "output: 'x", "14", "not YAML"),
    ("output: runs/quickstart", "---\nname: other", "13", "not YAML"),
    ("output: runs/quickstart", 'output: "\\U00110000"', "13", "an escape \\U beyond U+10FFFF"),
    ("output: runs/quickstart", 'output: "\\UFFFFFFFF"', "13", "an escape \\U beyond U+10FFFF"),
    ("output: runs/quickstart", "output: \x07", "13", "a character that YAML does not allow"),
]


@pytest.mark.parametrize(
    ("old", "new", "place", "reason"), REFUSED, ids=[f"{row[1][:40]!r}" for row in REFUSED]
)
def test_what_is_wrong_is_named_with_line_and_key(
    tmp_path: Path, old: str, new: str, place: str, reason: str
) -> None:
    assert old in SOUND
    message = refusal(tmp_path, SOUND.replace(old, new, 1))
    assert message.startswith(f"plan.yaml:{place}: ")
    assert reason in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "plan.yaml:1: the file is empty"),
        (b"# only a comment\n", "plan.yaml:1: the file is empty"),
        (b"- a\n- b\n", "plan.yaml:1: a plan is a mapping"),
        (b"just text", "plan.yaml:1: a plan is a mapping"),
        (b"name: a\nseed: \xff\n", "plan.yaml:2: not UTF-8"),
        (b"name: a\n" * 40_000, "plan.yaml: larger than 256 KiB"),
        (b"[" * 100_000, "plan.yaml:1: nested more than"),
    ],
)
def test_a_file_that_is_no_plan(tmp_path: Path, content: bytes, message: str) -> None:
    assert refusal(tmp_path, content).startswith(message)


def test_a_bomb_of_aliases_is_refused_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    assert refusal(tmp_path, "\n".join(lines)).startswith("plan.yaml:2: the alias *a0")


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no such plan file"):
        load_plan(tmp_path / "plan.yaml")
    with pytest.raises(PlanError, match="cannot be read"):
        load_plan(tmp_path)


@pytest.mark.parametrize(
    ("general", "own", "place"),
    [
        ("{branch: 9}", "{scratch: 500}", "4: schedule.cycle_steps.branch"),
        ("{branch: 500}", "9", "12: versions[1].cycle_steps"),
        ("500", "{branch: 9}", "12: versions[1].cycle_steps.branch"),
    ],
)
def test_a_short_cycle_is_reported_at_its_line(tmp_path: Path, general: str, own: str, place: str) -> None:
    text = SOUND.replace("warmup_steps: 20", f"warmup_steps: 20, cycle_steps: {general}")
    text = text.replace("v1, steps: 100", "v1, steps: 100, cycle_steps: inf")
    message = refusal(tmp_path, text.replace("v2, steps: 100", f"v2, steps: 100, cycle_steps: {own}"))
    assert message.startswith(f"plan.yaml:{place}: ")


def test_rewarm_max_needs_versions_longer_than_the_warm_up(tmp_path: Path) -> None:
    short = [{"name": "v1", "steps": 100}, {"name": "v2", "steps": 20}]
    assert plan_with(tmp_path, versions=short).versions[1].steps == 20
    with pytest.raises(PlanError, match="fills all 20 steps of continual-v2"):
        plan_with(tmp_path, versions=short, cpt_variant="rewarm-max")


def test_a_branch_at_step_zero_has_nothing_to_leave(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="at step 0, where there is no checkpoint"):
        plan_with(tmp_path, alpha=1.0, schedule={"warmup_steps": 0})


def test_a_branch_may_leave_where_the_warm_up_ends(tmp_path: Path) -> None:
    assert plan_with(tmp_path, alpha=0.8).run("ours", "branch-v1").first_step == 20


def test_keep_min_has_no_cycle_to_be_too_short(tmp_path: Path) -> None:
    cycle = {"schedule": {"cycle_steps": {"continual": 50}}, "versions": versions(1)}
    cycle["versions"].append({"name": "v2", "steps": 100, "cycle_steps": {"continual": 50}})
    del cycle["schedule"]
    assert plan_with(tmp_path, cpt_variant="keep-min", **cycle).versions[1].cycle_steps == {"continual": 50}
    with pytest.raises(PlanError, match="shorter than continual-v2"):
        plan_with(tmp_path, **cycle)


@pytest.mark.parametrize(
    "names",
    [
        ["v1", "v2", "v10"],
        ["2024-12", "2025-01"],
        ["base", "news", "code"],
        ["v1-10B", "v2-5B"],
        ["1.9", "1.10"],
    ],
)
def test_names_that_ascend_are_in_order(tmp_path: Path, names: list[str]) -> None:
    plan = plan_with(tmp_path, versions=[{"name": name, "steps": 100} for name in names])
    assert [version.name for version in plan.versions] == names


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_plan_is_read_or_refused_but_never_fails(tmp_path: Path, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(SOUND)))
    end = data.draw(st.integers(start, min(len(SOUND), start + 30)))
    middle = data.draw(st.text(alphabet="{}[]:,-&*!|>'\"%@#? \n\t\0abc019.eé", max_size=8))
    path = tmp_path / "plan.yaml"
    path.write_text(SOUND[:start] + middle + SOUND[end:], encoding="utf-8")
    message = ""
    try:
        plan = load_plan(path)
        for paradigm in ("ours", "ptfs", "cpt"):
            plan.cost(paradigm)
    except PlanError as error:
        message = str(error)
    assert not message or re.match(re.escape(str(path)) + r":\d+: ", message)


def test_the_json_schema_names_every_key() -> None:
    schema = json_schema()
    assert schema["required"] == [key.name for key in PLAN_KEYS if key.required]
    properties = schema["properties"]
    assert set(properties) == {key.name for key in PLAN_KEYS}
    assert set(properties["versions"]["items"]["properties"]) == {key.name for key in VERSION_KEYS}
    sections = {
        "schedule": SCHEDULE_KEYS,
        "batch": BATCH_KEYS,
        "tokenizer": TOKENIZER_KEYS,
        "data": DATA_KEYS,
        "branch_mix": MIX_KEYS,
        "sft": SFT_KEYS,
    }
    assert "adam_beta2" in properties["branch_megatron"]["properties"]
    assert "bf16" not in properties["branch_megatron"]["properties"]
    for name, keys in sections.items():
        assert set(properties[name]["properties"]) == {key.name for key in keys}
    assert properties["schedule"]["properties"]["wsd_decay_fraction"]["default"] == 0.1


def test_the_documentation_describes_every_key_and_its_example_is_a_plan(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "plan-file.md").read_text(encoding="utf-8")
    sections = (SCHEDULE_KEYS, BATCH_KEYS, TOKENIZER_KEYS, DATA_KEYS, VERSION_KEYS, MIX_KEYS, SFT_KEYS)
    for keys in (PLAN_KEYS, *sections):
        for key in keys:
            assert re.search(rf"^\| `{key.name}` \|.*\| {re.escape(key.about)} \|$", text, re.MULTILINE)
    example = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert example
    (tmp_path / "plan.yaml").write_text(example.group(1), encoding="utf-8")
    plan = load_plan(tmp_path / "plan.yaml")
    assert set(yaml.safe_load(example.group(1))) == {key.name for key in PLAN_KEYS} - {
        "adopted"
    }  # a key of a command
    assert round(plan.cost("ours").relative, 2) == 0.6
