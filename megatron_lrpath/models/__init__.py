"""Model recipes as data: Megatron arguments and their values, without torch."""

from megatron_lrpath.models.flags import megatron_flags
from megatron_lrpath.models.parameters import parameter_count
from megatron_lrpath.models.recipes import RECIPES, ModelSpec, Recipe, resolve_model

__all__ = ["RECIPES", "ModelSpec", "Recipe", "megatron_flags", "parameter_count", "resolve_model"]
