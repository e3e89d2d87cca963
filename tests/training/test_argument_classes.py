"""The table of arguments against Megatron's parser, and on command lines: --plan, --lr-path, own scripts."""

from __future__ import annotations

import argparse
import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from megatron_lrpath.errors import UserError
from megatron_lrpath.plan import Plan, load_plan
from megatron_lrpath.plan.arguments import (
    IDENTITY,
    NEUTRAL,
    PATH,
    PLAN,
    REFUSED,
    SET,
    START,
    Argument,
    table,
)
from tests.support import ROOT
from tests.support.plan_text import SOUND

pytest.importorskip("megatron.training")
from megatron_lrpath.training.options import arguments, from_arguments, from_plan

ROWS = [pytest.param(argument, id=name) for name, argument in sorted(table().items())]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Return a valid plan."""
    path = tmp_path_factory.mktemp("plan") / "plan.yaml"
    path.write_text(SOUND)
    return load_plan(path)


def values_of(argument: Argument) -> Any:
    """Return a value that the table allows, in the parser's type."""
    choices = argument.allowed or next(iter(argument.forms.values())).choices
    return next((one for one in choices if one not in argument.refused_values), True)


def test_the_table_has_every_argument_of_megatron_and_no_other() -> None:
    known = {action.dest for action in arguments.full_parser()._actions} - {"help"}
    assert set(table()) == known, "classify them in megatron_arguments.toml (scripts/megatron_arguments.py)"


def test_what_the_parser_takes_is_up_to_date() -> None:
    """The script runs in a separate process: it activates the CPU's backend, which changes torch."""
    argv = [sys.executable, str(ROOT / "scripts/megatron_arguments.py"), "--check"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("argument", ROWS)
def test_a_row_has_the_effect_of_its_class_with_lr_path(argument: Argument) -> None:
    given = {"lr_path": "main", argument.name: values_of(argument)}
    if argument.name == "load":
        given["save"] = given["load"]
    if argument.name == "lr_path_neutral":
        given["lr_path_neutral"] = []
    kept = argument.name in from_arguments.results_arguments(given | {"loss_spike_action": "skip"})
    if argument.path == REFUSED:
        with pytest.raises(UserError, match=f"^{argument.option} cannot be given with --lr-path; "):
            from_arguments.refuse_with_path(given, None)
        return
    from_arguments.refuse_with_path(given, None)
    assert kept == (argument.path in (IDENTITY, SET))


@pytest.mark.parametrize("argument", ROWS)
def test_a_row_has_the_effect_of_its_class_next_to_a_plan(argument: Argument, plan: Plan) -> None:
    given = {argument.name: values_of(argument)}
    said = from_plan.refused(given, plan)
    if argument.plan == SET:
        assert said == [
            f"{argument.option} follows from the plan: set `{argument.key}` in {plan.path} instead."
        ]
    elif argument.plan == REFUSED:
        assert said == [f"{argument.option} cannot be given with a plan ({plan.path}): {argument.why(PLAN)}."]
    else:
        assert not said
        kept = argument.name in from_arguments.results_arguments(given | {"loss_spike_action": "skip"})
        assert kept == (argument.plan == IDENTITY)
        assert argument.plan in (NEUTRAL, IDENTITY, START)


@pytest.mark.parametrize("way", [PLAN, PATH])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dataloader_type", "cyclic"),
        ("dataloader_type", "external"),
        ("optimizer", "sgd"),
        ("ckpt_format", "torch"),
    ],
)
def test_a_value_that_is_refused_is_named(name: str, value: str, way: str, plan: Plan) -> None:
    if way == PLAN:
        said = from_plan.refused({name: value}, plan)[0]
    else:
        with pytest.raises(UserError) as raised:
            from_arguments.refuse_with_path({"lr_path": "main", name: value}, None)
        said = str(raised.value)
    assert said.startswith(f"{table()[name].option} {value} cannot be given with")


def test_all_refusals_of_a_command_line_come_in_one_message() -> None:
    given = {"lr_path": "main", "no_save_optim": True, "finetune": True, "dataloader_type": "cyclic"}
    with pytest.raises(UserError) as raised:
        from_arguments.refuse_with_path(given | {"load": "elsewhere"}, None)
    message = str(raised.value)
    assert message.startswith("4 problems:")
    for word in ("--no-save-optim", "--finetune", "--dataloader-type cyclic", "--load elsewhere"):
        assert f"- {word}" in message


def own_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the arguments of a team's script."""
    parser.add_argument("--team-loss", type=float)
    parser.add_argument("--team-log", action="store_true")
    return parser


def test_a_scripts_own_arguments_belong_to_the_run_unless_they_are_named() -> None:
    line = ["--lr-path", "main", "--team-loss", "0.5", "--team-log"]
    given = arguments.explicit_arguments(line, own_arguments)
    from_arguments.refuse_with_path(given, own_arguments)
    assert from_arguments.results_arguments(given).keys() >= {"team_loss", "team_log"}
    given = arguments.explicit_arguments([*line, "--lr-path-neutral", "--team-log"[2:]], own_arguments)
    from_arguments.refuse_with_path(given, own_arguments)
    kept = from_arguments.results_arguments(given)
    assert "team_loss" in kept
    assert not {"team_log", "lr_path_neutral"} & kept.keys()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "team-lgo",
            "--lr-path-neutral team_lgo: this script has no such argument (did you mean 'team_log'?)",
        ),
        (
            "weight-decay",
            "--lr-path-neutral weight_decay: an argument of Megatron's, which has its class already",
        ),
    ],
)
def test_only_a_scripts_own_arguments_can_be_called_neutral(name: str, said: str) -> None:
    given = arguments.explicit_arguments(["--lr-path", "main", "--lr-path-neutral", name], own_arguments)
    with pytest.raises(UserError) as raised:
        from_arguments.refuse_with_path(given, own_arguments)
    assert said in str(raised.value)


def test_an_argument_of_another_megatron_is_refused_and_one_of_a_fork_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {"lr_path": "main", "nobody_knows": 3}
    from_arguments.refuse_with_path(given, None)  # a fork of the Megatron in the table
    assert "nobody_knows" in from_arguments.results_arguments(given)
    monkeypatch.setattr("megatron.core.__version__", "0.20.0")
    with pytest.raises(UserError, match="this argument is not classified for Megatron"):
        from_arguments.refuse_with_path(given, None)
    from_arguments.refuse_with_path({"lr_path": "main", "team_log": True}, own_arguments)


def test_a_scripts_defaults_are_refused_as_its_arguments() -> None:
    defaults = {"dataloader_type": "cyclic", "no_load_rng": True, "tokenizer_type": "GPT2BPETokenizer"}
    found = "\n".join(arguments.default_problems(defaults, {}))
    assert "--dataloader-type cyclic among the script's args_defaults" in found
    assert "--no-load-rng among the script's args_defaults" in found
    given = {"dataloader_type": "single"}
    assert not arguments.default_problems({"no_load_optim": False, "dataloader_type": "cyclic"}, given)


# Where an argument is parsed, printed, or compared with a checkpoint, it has no effect yet; the others build or run
# models that are not trained here.
ELSEWHERE = (
    "training/arguments.py", "training/argument_utils.py", "training/yaml_arguments.py", "training/checkpointing.py",
    "/export/", "/inference/", "/rl/", "/modelopt/", "/T5/", "/bert/", "/multimodal/", "/vision/", "/hybrid/",
)  # fmt: skip
READ_OTHERWISE = {
    "grad_reduce_in_bf16": "sets accumulate_allreduce_grads_in_fp32 when the arguments are validated",
    "use_rotary_position_embeddings": "sets position_embedding_type when the arguments are validated",
    "no_weight_decay_cond_type": "sets apply_wd_to_qk_layernorm, or is refused, when the arguments are validated",
    "init_method_xavier_uniform": "sets the initialization when the model's configuration is made",
    "quick_geglu": "sets the activation when the model's configuration is made",
    "max_position_embeddings": "sets seq_length when the model's configuration is made",
    "rotary_seq_len_interpolation_factor": "sets seq_len_interpolation_factor when the configuration is made",
    "use_rope_scaling": "sets rope_scaling when the model's configuration is made",
    "te_precision_config_file": "sets the quantization when the model's configuration is made",
    "spec": "selects the layers when the model's configuration is made",
}
"""Arguments whose effect Megatron's own argument code passes on under another name."""
BY_PREFIX = "muon_"
"""Arguments that Megatron reads as `getattr(config, prefix + name)`."""


def readers(tree: ast.AST) -> Iterator[str]:
    """Yield the names of the attributes that code reads."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node.attr
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            yield from (one.value for one in node.args[1:2] if isinstance(one, ast.Constant))


def test_every_argument_that_belongs_to_a_run_is_read_by_what_trains_it() -> None:
    """What nothing reads would be ignored in silence; such arguments are refused."""
    import megatron.core

    read: set[str] = set()
    root = Path(megatron.core.__file__).parents[1]
    for file in [*(root / "core").rglob("*.py"), *(root / "training").rglob("*.py")]:
        if not any(part in str(file) for part in ELSEWHERE):
            read.update(readers(ast.parse(file.read_text(encoding="utf-8"))))
    ours = {name for name in table() if name.startswith(("loss_spike", "lr_path"))}
    refused = {name for name, row in table().items() if row.script}
    assert not read & set(READ_OTHERWISE), "no longer needed"
    known = read | ours | refused | set(READ_OTHERWISE)
    unread = {name for name, row in table().items() if row.plan == IDENTITY and name not in known}
    assert {name for name in unread if not name.startswith(BY_PREFIX)} == set()


def test_the_models_configuration_gets_every_argument_of_its_own() -> None:
    """`gpt_config_from_args` leaves some fields at their defaults that have an argument of the same name."""
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.models.gpt import GPTModelConfig

    tree = ast.parse(inspect.getsource(gpt_config_from_args))
    passed = {
        node.slice.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant)
    }
    left_out = {field.name for field in fields(GPTModelConfig)} & set(table()) - passed
    # `take_rope_factor` sets the first; Megatron's `initialize.py` reads the second from the arguments.
    assert left_out == {"rope_scaling_factor", "tp_comm_overlap_cfg"}


def test_the_datasets_get_every_argument_of_their_own() -> None:
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig

    from megatron_lrpath.training.datasets import dataset_config

    tree = ast.parse(inspect.getsource(dataset_config))
    passed = {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword)}
    left_out = {field.name for field in fields(GPTDatasetConfig)} & set(table()) - passed
    belongs = {name for name in left_out if table()[name].path == IDENTITY and not table()[name].script}
    assert belongs == set()
