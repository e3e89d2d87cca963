"""The table of arguments: every row is complete, and has the effect of its class in a plan file."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_lrpath.errors import PlanError
from megatron_lrpath.plan import load_plan, run_identity
from megatron_lrpath.plan.arguments import (
    CLASSES,
    IDENTITY,
    NEUTRAL,
    PATH,
    PLAN,
    REFUSED,
    SET,
    START,
    TABLE_FILE,
    Argument,
    by_option,
    find,
    is_neutral,
    parser_facts,
    table,
)
from megatron_lrpath.plan.launch_line import line_problems, read_script, read_words
from tests.support.plan_text import SOUND, plan_with

ONCE_NEUTRAL = """
    tensor_model_parallel_size no_rope_fusion no_overlap_p2p_communication persistent_save_interval use_nccl_ub
    no_barrier_with_level_1_timing wandb_project save_interval eval_iters manual_gc exit_interval num_workers
    use_megatron_fsdp error_injection_rate inprocess_restart non_persistent_ckpt_type adlr_autoresume
    micro_batch_size tensorboard_dir peak_tflops cuda_graph_impl disable_tp_comm_overlap_ag
"""
FITTING = {  # with the other values of the plan
    "save_retain_interval": 500,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
    "tensor_model_parallel_size": 2,
    "context_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "recompute_granularity": "selective",
}
ROWS = [pytest.param(argument, id=name) for name, argument in sorted(table().items())]


def value_for(argument: Argument, option: str) -> Any:
    """Return a value that the parser accepts for an option, and that the table allows if it allows any."""
    form = argument.forms[option]
    if option in FITTING:
        return FITTING[option]
    if form.type == "flag":
        return True
    choices = [one for one in argument.allowed or form.choices if one not in argument.refused_values] or [
        {"int": 3, "float": 0.5, "text": "some"}[form.type]
    ]
    if form.nargs is None:
        return choices[0]
    return choices[:1] * (form.nargs if isinstance(form.nargs, int) else 1)


def plan_of(folder: Path, section: str, **arguments: Any) -> Path:
    """Write a valid plan with these arguments in a section; return its path."""
    content = yaml.safe_load(SOUND)
    before = content.get(section) or {}
    content[section] = ({"recipe": before} if isinstance(before, str) else before) | arguments
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def error_of(folder: Path, section: str, **arguments: Any) -> str:
    """Return the error of `load_plan`; empty if there is none."""
    try:
        load_plan(plan_of(folder, section, **arguments))
    except PlanError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("argument", ROWS)
def test_a_row_has_all_fields_that_its_class_needs(argument: Argument) -> None:
    assert {argument.plan, argument.path} <= set(CLASSES)
    assert argument.forms, "the parser has no such argument"
    for way in (PLAN, PATH):
        found = argument.class_for(way)
        if found == NEUTRAL:
            assert argument.reason
        if found == REFUSED:
            assert argument.instead or argument.refusal
            assert argument.why(way)
    if argument.plan == SET:
        assert argument.key
    if argument.allowed or argument.refused_values:
        assert argument.refusal
    for form in argument.forms.values():
        assert set(argument.allowed) | set(argument.refused_values) <= set(form.choices)


@pytest.mark.parametrize("argument", ROWS)
def test_a_row_has_the_effect_of_its_class_in_a_plan_file(argument: Argument, tmp_path: Path) -> None:
    plan = load_plan(plan_of(tmp_path, "megatron"))
    plain = run_identity(plan, plan.main)
    for option in argument.forms:
        value = value_for(argument, option)
        said = error_of(tmp_path, "megatron", **{option: value})
        if "set it under `model:`" in said:
            said = error_of(tmp_path, "model", **{option: value})
            assert not said
            continue
        if argument.key:
            assert f"follows from the plan; leave it out and set `{argument.key}`" in said
        elif argument.plan == START or argument.name.startswith("lr_path"):
            assert "selects the run to start" in said
        elif argument.plan == REFUSED:
            assert f"cannot be set in a plan: {argument.why(PLAN)}" in said
            assert not error_of(tmp_path, "megatron", **{option: False})
        else:
            assert not said
            plan = load_plan(tmp_path / "plan.yaml")
            assert (run_identity(plan, plan.main) != plain) == (argument.plan == IDENTITY)


def test_every_value_that_is_refused_is_refused_in_a_plan(tmp_path: Path) -> None:
    for name, value in {
        "dataloader_type": "cyclic",
        "optimizer": "sgd",
        "ckpt_format": "torch",
        "transformer_impl": "inference_optimized",
        "dist_ckpt_strictness": "ignore_all",
        "exit_signal": "SIGINT",
    }.items():
        assert f"megatron.{name}: cannot be set in a plan" in error_of(tmp_path, "megatron", **{name: value})


def test_every_range_is_of_a_number_of_megatrons() -> None:
    rows = tomllib.loads(TABLE_FILE.read_text(encoding="utf-8"))["range"]
    names = [name for row in rows for name in row["names"].split()]
    assert len(names) == len(set(names))
    for name in names:
        forms = [form for form in table()[name].forms.values() if form.type != "flag"]
        assert forms
        assert all(form.bounds for form in forms)


def test_a_misspelt_size_of_a_model_without_a_recipe_is_named(tmp_path: Path) -> None:
    model = {"num_layer": 2, "hidden_size": 32, "num_attention_heads": 4}
    with pytest.raises(
        PlanError, match=r"requires num_layers.*no argument 'num_layer' .did you mean 'num_layers'"
    ):
        plan_with(tmp_path, model=model)


@pytest.mark.parametrize(
    ("section", "argument", "said"),
    [
        ("megatron", {"save_intervall": 20}, "no argument 'save_intervall' (did you mean 'save_interval'?)"),
        ("model", {"num_layer": 2}, "no argument 'num_layer' (did you mean 'num_layers'?)"),
        ("megatron", {"save_interval": "abc"}, "must be a whole number, not 'abc'"),
        ("megatron", {"save_interval": 20.5}, "must be a whole number, not 20.5"),
        ("megatron", {"save_interval": True}, "needs a whole number, not true"),
        ("megatron", {"save_interval": [1, 2]}, "takes one value (a whole number), not a list"),
        ("megatron", {"clip_grad": "nan"}, "must be a finite number, not nan"),
        ("megatron", {"adam_beta2": 1.5}, "must be at least 0 and below 1, not 1.5"),
        ("megatron", {"log_interval": 0}, "must be at least 1, not 0"),
        ("megatron", {"weight-decay": "-0.1"}, "must be at least 0, not -0.1"),
        ("model", {"attention_dropout": 1.5}, "must be at least 0 and at most 1, not 1.5"),
        ("model", {"num_layers": 0}, "must be at least 1, not 0"),
        ("branch_megatron", {"adam_eps": -1}, "must be at least 0, not -1"),
        ("megatron", {"bf16": 1}, "is a flag: give true or false, not 1"),
        (
            "megatron",
            {"recompute_granularity": "ful"},
            "'ful' is none of full, selective (did you mean 'full'?)",
        ),
        ("megatron", {"recompute_modules": [True]}, "must be text, not true"),
        ("megatron", {"help": True}, "no argument 'help'"),
        ("megatron", {"no-save-optim": True}, "megatron.no-save-optim: cannot be set in a plan"),
        ("model", {"no_save_optim": True}, "model.no_save_optim: cannot be set in a plan"),
    ],
)
def test_names_and_values_are_checked_when_a_plan_is_read(
    section: str, argument: dict[str, Any], said: str, tmp_path: Path
) -> None:
    message = error_of(tmp_path, section, **argument)
    assert said in message
    assert message.startswith(f"{tmp_path / 'plan.yaml'}:")


def test_all_problems_of_a_plans_arguments_come_in_one_message(tmp_path: Path) -> None:
    content = yaml.safe_load(SOUND)
    content["model"] = {"recipe": "tiny", "num_layer": 2}
    content["megatron"] = {"save_intervall": 20, "lr": 3, "bf16": 1, "eval_iters": 2}
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(PlanError) as raised:
        load_plan(path)
    lines = str(raised.value).splitlines()
    assert [line.split(": ")[1] for line in lines] == [
        "model.num_layer", "megatron.bf16", "megatron.lr", "megatron.save_intervall",
    ]  # fmt: skip
    assert all(line.startswith(f"{path}:") for line in lines)


def test_values_as_the_parser_takes_them_are_accepted(tmp_path: Path) -> None:
    arguments = {
        "save-interval": "20",
        "clip_grad": 1,
        "moe_layer_freq": "([0]*1+[1]*3)",
        "recompute_modules": "core_attn",
        "profile_ranks": [0, 1],
        "optimizer": "muon",
        "attention_backend": "flash",
        "no_check_for_nan_in_loss_and_grad": False,
    }
    assert not error_of(tmp_path, "megatron", **arguments)


def test_what_an_older_version_called_neutral_is_neutral_or_refused() -> None:
    """A run must not differ from its own lineage because an argument became part of the identity."""
    for name in ONCE_NEUTRAL.split():
        argument = find(name)
        assert argument is not None
        assert is_neutral(name) or argument.plan == REFUSED, name


def test_an_option_and_its_destination_are_one_argument() -> None:
    assert find("no_rope_fusion") is find("apply_rope_fusion")
    assert find("norm_epsilon") is find("layernorm_epsilon")
    assert find("nobody_knows") is None
    facts = parser_facts()
    options = {option.replace("-", "_") for fact in facts for option in fact["options"]}
    assert set(by_option()) == options


def test_a_launch_line_is_read_from_behind_the_script() -> None:
    line = "torchrun --nproc-per-node 8 -m x pretrain_gpt.py --lr 3e-4 --lr-path-neutral a b --bf16 --num-layers=4"
    found = {one.option: one for one in read_words(line.split())}
    assert list(found) == ["--lr", "--lr-path-neutral", "--bf16", "--num-layers"]
    assert found["--num-layers"].values == ("4",)
    module = ["torchrun", "--nproc-per-node", "8", "-m", "--", "megatron_lrpath.pretrain_gpt", "--lr", "3e-4"]
    assert [one.text for one in read_words(module)] == ["--lr 3e-4"]
    assert [one.class_for(PLAN) for one in read_words(["--dataloader-type", "cyclic", "--nope"])] == [
        "refused",
        "unknown",
    ]


def test_a_launch_script_is_read_with_arguments_in_any_place() -> None:
    script = """
        # --lr 7
        LAUNCH=(--nproc_per_node $GPUS)
        MODEL=( --num-layers 96
                --hidden-size 12288 )
        TRAIN="--micro-batch-size 1 \\
               --rampup-batch-size 16 16 5859375
               --lr 6.0e-5"
        torchrun ${LAUNCH[@]} pretrain_gpt.py ${MODEL[@]} $TRAIN --bf16 \\
            --recompute-modules core_attn moe $MORE_ARGS
    """
    assert [one.text for one in read_script(script)] == [
        "--num-layers 96", "--hidden-size 12288", "--micro-batch-size 1", "--rampup-batch-size 16 16 5859375",
        "--lr 6.0e-5", "--bf16", "--recompute-modules core_attn moe",
    ]  # fmt: skip


def test_what_follows_a_command_is_checked_before_it_starts() -> None:
    line = "--no-save-optim --save-interval abc --log-interval 5 --run main --min-lr -1e-5 --own 3 --optimizer sgd "
    line += "--adam-beta1 1"
    assert line_problems(["-x", "5", "--log-interval", "5"]) == [
        "-x 5: belongs to no option; options begin with two dashes."
    ]
    assert [problem.split(":")[0] for problem in line_problems(line.split())] == [
        "--no-save-optim", "--save-interval", "--run", "--optimizer sgd", "--adam-beta1",
    ]  # fmt: skip
