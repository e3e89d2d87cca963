"""Arguments that act only together with others are refused without them; nothing is ignored without a word."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_lrpath.models import RECIPES
from megatron_lrpath.plan.arguments import IDENTITY, table
from megatron_lrpath.plan.companions import companions, without_effect


def test_the_rows_name_arguments_of_the_table_once() -> None:
    names = [one.name for one in companions()]
    assert len(names) == len(set(names))
    assert {table()[name].plan for name in names} == {IDENTITY}
    assert {condition.partition("=")[0] for one in companions() for condition in one.of} <= set(table())
    assert all(one.of for one in companions())


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"num_query_groups": 2}, "--num-query-groups has no effect without --group-query-attention"),
        ({"num_query_groups": 2, "group_query_attention": True}, None),
        ({"num_query_groups": 2, "group_query_attention": False}, "--num-query-groups"),
        ({"num_query_groups": False}, None),
        (
            {"use_rope_scaling": True},
            "--use-rope-scaling has no effect without --position-embedding-type rope or",
        ),
        ({"use_rope_scaling": True, "use_rotary_position_embeddings": True}, None),
        ({"rope_scaling_factor": 32, "position_embedding_type": "rope"}, "--rope-scaling-factor"),
        ({"adam_beta2": 0.99}, None),
        ({"adam_beta2": 0.99, "optimizer": "lion"}, "--adam-beta2 has no effect without --optimizer adam"),
        ({"lion_beta1": 0.9}, "--lion-beta1 has no effect without --optimizer lion"),
        ({"moe_router_topk": 2}, "--moe-router-topk has no effect without --num-experts"),
        ({"reset_attention_mask": True}, "--reset-attention-mask has no effect: only a script"),
        (
            {"fim_rate": 0.5},
            "--fim-rate has no effect: only a script of your own with such samples can read it",
        ),
        ({"reset_position_ids": True}, None),
        (
            {"reset_position_ids": True, "position_embedding_type": "rope"},
            "--reset-position-ids has no effect",
        ),
        ({"hybrid_layer_pattern": "M*"}, "--hybrid-layer-pattern has no effect: only a script"),
        ({"initial_loss_scale": 4096, "bf16": True}, "--initial-loss-scale has no effect without --fp16"),
    ],
)
def test_what_has_no_effect_is_found(given: dict[str, Any], found: str | None) -> None:
    lines = without_effect(given)
    assert len(lines) == (found is not None)
    assert not found or lines[0].startswith(found)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_argument_of_the_recipes_acts(recipe: str) -> None:
    assert without_effect(RECIPES[recipe].arguments) == []
