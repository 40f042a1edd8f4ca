"""`Group`: linear modules that read the same input."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

__all__ = ["Group", "group_name"]


@dataclass(frozen=True)
class Group:
    """Modules that read the same input tensor.

    Attributes:
        name: the members' common parent and their names in it, e.g. "model.layers.0.self_attn.q_proj+k_proj+v_proj".
        members: full module names, in call order.
        in_features: width d of the shared input.
        out_features: each member's width o_i, in the order of `members`.
        block: name of the decoder block that contains the group, or the member's own name if no block does.
    """

    name: str
    members: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]
    block: str

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Member name -> (out_features, in_features)."""
        return {name: (width, self.in_features) for name, width in zip(self.members, self.out_features, strict=True)}

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of the shared input, and of the output of each member."""
        return (self.in_features, *self.out_features)

    @property
    def parent(self) -> str:
        """Name of the innermost module that holds every member ("" for the model itself)."""
        return _common_parent(self.members)

    def apart(self) -> list[Group]:
        """Return each member as a separate group."""
        pairs = zip(self.members, self.out_features, strict=True)
        return [Group(member, (member,), self.in_features, (width,), self.block) for member, width in pairs]


def _common_parent(members: Iterable[str]) -> str:
    steps = zip(*(member.split(".")[:-1] for member in members), strict=False)
    return ".".join(step[0] for step in takewhile(lambda step: len(set(step)) == 1, steps))


def group_name(members: Sequence[str]) -> str:
    """Return the name of a group with these members: their common parent, and their names in it joined by "+"."""
    parent = _common_parent(members)
    local = "+".join(member.removeprefix(f"{parent}.") for member in members)
    return f"{parent}.{local}" if parent else local
