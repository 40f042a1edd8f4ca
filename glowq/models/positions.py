"""How many tokens of one sequence a model has positions for."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .forward import input_embeddings

__all__ = ["limit_of_config", "position_limit", "stated_positions"]


def stated_positions(config: Any) -> int | None:
    """The number of positions that a model's config states; None if it states no limit."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else None  # XLNet says -1


def position_limit(model: nn.Module) -> int | None:
    """Most tokens of one sequence that a model has positions for; None if its config states no limit.

    A table of positions may reserve its first rows: with a padding index p, as RoBERTa's has, tokens take the rows from
    p + 1 on.

    Args:
        model: a model of transformers; its weights are not read, so that they may be on the meta device.
    """
    config = getattr(model, "config", None)
    most = None if config is None else stated_positions(config)
    if most is None:
        return None
    words = input_embeddings(model)
    reserved = [_reserved(module, most) for module in model.modules() if module is not words]
    return most - max(reserved)


def limit_of_config(config: Any, model_class: Any) -> int | None:
    """The same as `position_limit`, for a model that is not loaded.

    Args:
        config: the model's config.
        model_class: class of transformers that makes the model.
    """
    make = model_class.from_config if hasattr(model_class, "from_config") else model_class._from_config
    with torch.device("meta"):
        return position_limit(make(copy.deepcopy(config)))


def _reserved(module: nn.Module, most: int) -> int:
    """Number of rows at the start of a table of `most` positions that no token takes; 0 if it is no such table."""
    padding, table = getattr(module, "padding_idx", None), getattr(module, "weight", None)
    if not isinstance(padding, int) or not isinstance(table, Tensor) or table.dim() != 2 or table.shape[0] != most:
        return 0
    return padding + 1
