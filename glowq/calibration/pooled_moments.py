"""Input moments of experts that get few tokens: those of all experts of their layer together."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from ..factors.group import Group
from ..solving.moments import Moments
from .input_moments import MomentCollector

__all__ = ["families", "moments_of"]


def families(groups: Sequence[Group]) -> list[list[Group]]:
    """Groups of the same shape in the same block whose names differ only in numbers, as those of experts do.

    Args:
        groups: groups of any blocks.

    Returns:
        Every group once, alone or with the others of its family, in the order of `groups`.
    """
    found: dict[tuple[object, ...], list[Group]] = {}
    for group in groups:
        inside = group.name.removeprefix(f"{group.block}.")
        key = (group.block, re.sub(r"\d+", "*", inside), group.in_features, group.out_features)
        found.setdefault(key, []).append(group)
    return list(found.values())


def moments_of(
    collectors: Sequence[MomentCollector], ranks: Mapping[str, int]
) -> tuple[dict[str, Moments], list[Group]]:
    """The moments of every group. A group that got fewer tokens than its rank takes those of its whole family.

    Args:
        collectors: those of a block's groups; of a family with several members, without `error`.
        ranks: group name -> rank, 0 for one that is not solved.

    Returns:
        Group name -> moments; and the groups that took their family's.

    Raises:
        CalibrationError: no token reached a group or any other of its family.
        NonFiniteError: an input held NaN or Inf.
    """
    of_group = {one.group.name: one for one in collectors}
    found: dict[str, Moments] = {}
    pooled: list[Group] = []
    for family in families([one.group for one in collectors]):
        if not any(of_group[group.name].tokens for group in family):
            of_group[family[0].name].moments()  # raises the error
        own = {group.name: of_group[group.name].moments() for group in family if of_group[group.name].tokens}
        lacking = [group for group in family if of_group[group.name].tokens < ranks[group.name]]
        found |= own
        if lacking and len(family) > 1:
            found |= dict.fromkeys((group.name for group in lacking), _pooled(list(own.values())))
            pooled += lacking
    return found, pooled


def _pooled(moments: Sequence[Moments]) -> Moments:
    """The moments over the tokens of all groups together."""
    tokens = sum(one.tokens for one in moments)
    magnitudes = [one.magnitude for one in moments if one.magnitude is not None]
    if magnitudes:
        return Moments(tokens, magnitude=torch.stack(magnitudes).amax(0))
    seconds = [one.second * (one.tokens / tokens) for one in moments if one.second is not None]
    second = torch.stack(seconds).sum(0)
    return Moments(tokens, second=second, mean_square=second.diagonal().mean())
