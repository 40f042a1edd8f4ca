"""Factors of few bits: the rounding error, and a model that computes the same with them as with equal float factors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import glowq
from glowq.factors.factors import GroupFactors
from glowq.factors.form import FactorForm
from glowq.factors.group import Group
from glowq.factors.integers import LEFT_UNIT, pack, round_factors, unpack
from glowq.runtime.attach import attach, attached, attached_factors, hold_as_floats
from glowq.runtime.switching import disabled

Factory = Callable[..., Any]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


SHAPES = {"q": (24, 40), "k": (8, 40)}


def drawn(dtype: torch.dtype, rank: int = 6) -> tuple[Tensor, dict[str, Tensor]]:
    """Return random factors whose ranks have very different sizes; the third rank is zero."""
    sizes = torch.logspace(0, -3, rank)
    sizes[2] = 0
    right, lefts = torch.randn(rank, 40) * sizes[:, None], {"q": torch.randn(24, rank), "k": torch.randn(8, rank) / 3}
    return right.to(dtype), {member: left.to(dtype) for member, left in lefts.items()}


def parts(right: Tensor, lefts: dict[str, Tensor]) -> Tensor:
    """Return the product A_k B_k of every rank k for all members, shape (r, O, d), float64."""
    left = torch.cat(list(lefts.values())).double()
    return left.T[:, :, None] * right.double()[:, None]


class TestRounding:
    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("bits", [8, 4, 3])
    def test_whole_numbers_hold_what_is_rounded_exactly(self, dtype: torch.dtype, bits: int) -> None:
        right, lefts = round_factors(*drawn(dtype), bits)
        packed = pack(right, lefts, bits)
        expected = torch.int8 if bits == 8 else torch.uint8
        assert {packed.right.values.dtype, *(left.values.dtype for left in packed.lefts.values())} == {expected}
        stored = [packed.right, *packed.lefts.values()]
        held = sum(part.numel() for each in stored for part in each if part is not None) + 4 * len(right)
        assert held == len(right) * FactorForm(bits, 0).rank_bytes((40, 24, 8))
        assert packed.scale.log2().frac().eq(0).all()
        for other in FLOATS:
            again, again_lefts = unpack(packed, other, SHAPES)
            assert torch.equal(again, right.to(other))
            assert all(torch.equal(again_lefts[member], left.to(other)) for member, left in lefts.items())

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_every_value_is_off_by_half_a_step_at_most(self, dtype: torch.dtype) -> None:
        """Each rounded value is at most half a step from its exact value.

        The step of a row is its largest value divided by 127. The step of a column is at most twice as large, because
        its scale is a power of two.
        """
        right, lefts = drawn(dtype)
        found, found_lefts = round_factors(right, lefts)
        for rank in range(len(right)):
            size = float(parts(right, lefts)[rank].abs().max())
            column = torch.cat([left[:, rank].double() for left in found_lefts.values()])
            plain = torch.cat([left[:, rank].double() for left in lefts.values()])
            if size == 0:
                assert not found[rank].any()
                assert not column.any()
                continue
            row, before = found[rank].double(), right[rank].double()
            row, before = row / row.abs().max(), before / before.abs().max()
            assert (row - before).abs().max() <= 0.5 / 127 + 1e-6
            stretched = float(row @ before / (before @ before))  # rounding changes the norm of the row slightly
            error = (parts(found, found_lefts)[rank] - parts(right, lefts)[rank]).abs().max() / size
            assert error <= 0.5 / 127 + 1.0 / 127 + 1.0 / 127**2 + 1e-6
            assert abs(stretched - 1) < 0.01
            assert float((column / column.abs().max() - plain / plain.abs().max()).abs().max()) <= 2.0 / 127

    @pytest.mark.parametrize("bits", [8, 4, 3])
    def test_ranks_can_be_cut_off_afterwards(self, bits: int) -> None:
        right, lefts = round_factors(*drawn(torch.bfloat16), bits)
        whole = pack(right, lefts, bits)
        part = pack(right[:3], {member: left[:, :3] for member, left in lefts.items()}, bits)
        assert torch.equal(part.right.values, whole.right.values[:3])
        assert torch.equal(part.scale, whole.scale[:3])
        assert all(torch.equal(part.lefts[member].values, left.values[:, :3]) for member, left in whole.lefts.items())
        if bits < 8:
            assert torch.equal(part.right.multipliers, whole.right.multipliers[:3])

    @pytest.mark.parametrize(("bits", "most"), [(8, 0.016), (4, 0.14), (3, 0.27)])
    def test_the_error_of_random_factors(self, bits: int, most: float) -> None:
        """The relative error of a product of Gaussian factors is that of both: about 2 * 2^-bits times a constant."""
        right, lefts = torch.randn(4, 640), {"q": torch.randn(320, 4)}
        found = parts(*round_factors(right, lefts, bits))
        exact = parts(right, lefts)
        assert float((found - exact).norm() / exact.norm()) < most

    def test_rounding_twice_changes_nothing(self) -> None:
        once = round_factors(*drawn(torch.float32))
        twice = round_factors(*once)
        assert torch.equal(parts(*once), parts(*twice))

    def test_the_smallest_scales_are_those_that_float16_holds(self) -> None:
        right, lefts = round_factors(torch.full((1, 8), 1e-9), {"q": torch.ones(4, 1)})
        packed = pack(right, lefts)
        assert float(packed.scale) == 2.0**-24
        assert torch.equal(unpack(packed, torch.float16, {"q": (4, 8)})[0].float(), right)


class TestInAModel:
    @pytest.fixture(params=[(8, torch.int8), (4, torch.int8), (3, torch.int8), (4, torch.uint8), (3, torch.uint8)])
    def held(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, torch.dtype]:
        """Bits per value, and the dtype in memory. A CPU holds 4 and 3 bits in int8; in blocks here, too, as a GPU."""
        bits, dtype = request.param
        if dtype == torch.uint8:
            monkeypatch.setattr("glowq.runtime.attach.in_bytes", lambda packed, shapes, multiple: packed)
        return bits, dtype

    @pytest.fixture
    def bits(self, held: tuple[int, torch.dtype]) -> int:
        return held[0]

    @pytest.fixture
    def rounded(self, random_factors: Factory, bits: int) -> GroupFactors:
        group = Group("q+k+v", ("q", "k", "v"), 8, (6, 4, 5), "")
        entry = random_factors(group)
        right, lefts = round_factors(entry.right, entry.lefts, bits)
        return replace(entry, right=right, lefts=lefts, bits=bits)

    @pytest.fixture
    def pair(self, trio: Any, rounded: GroupFactors) -> tuple[Any, Any]:
        """Two equal models, one with whole numbers and one with the same values as floats."""
        glowq.detach(trio)
        plain = type(trio)()
        plain.load_state_dict(trio.state_dict())
        attach(trio, rounded)
        attach(plain, replace(rounded, bits=None))
        return trio, plain

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
    @pytest.mark.parametrize("tokens", [1, 3, 16, 17, 0])
    def test_the_model_computes_what_the_same_floats_compute(
        self, pair: tuple[Any, Any], held: tuple[int, torch.dtype], dtype: torch.dtype, mode: Any, tokens: int
    ) -> None:
        model, plain = (each.to(dtype) for each in pair)
        assert model.get_submodule("glowq_q").right.factor.dtype == held[1]
        with mode():
            x = torch.randn(tokens, 8, dtype=dtype)
            found, expected = model(x), plain(x)
        assert found.dtype == dtype
        tolerance = 16 * torch.finfo(dtype).eps
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)

    @pytest.mark.parametrize("rank", [1, 3, 15, 16, 17])
    def test_ranks_of_zeros_are_held_and_never_seen(self, trio: Any, random_factors: Factory, rank: int) -> None:
        """Zero ranks fill int8 factors up to a multiple of 16, because torch's CPU product takes 16 ranks at once."""
        glowq.detach(trio)
        entry = random_factors(Group("q+k+v", ("q", "k", "v"), 8, (6, 4, 5), ""), rank=rank)
        right, lefts = round_factors(entry.right, entry.lefts)
        container = attach(trio, replace(entry, right=right, lefts=lefts, bits=8))
        assert container.rank == rank
        assert container.right.factor.shape == (-(-rank // 16) * 16, 8)
        (found,) = attached_factors(trio)
        assert torch.equal(found.right, right)
        assert all(torch.equal(found.lefts[member], left) for member, left in lefts.items())
        assert found.factor_bytes == rank * (8 + 15 + 4)
        x = torch.randn(3, 8)
        with torch.no_grad():
            with disabled(trio):
                plain = trio(x)
            added = (x.double() @ right.double().T) @ torch.cat(list(lefts.values())).double().T
            torch.testing.assert_close(trio(x).double(), plain.double() + added, rtol=1e-5, atol=1e-5)

    def test_no_scale_has_to_be_converted_at_every_call(self, trio: Any, rounded: GroupFactors) -> None:
        glowq.detach(trio)
        lefts = {member: left.bfloat16() for member, left in rounded.lefts.items()}
        container = attach(trio.bfloat16(), replace(rounded, right=rounded.right.bfloat16(), lefts=lefts))
        assert {factor.scale.dtype for factor in container._factors} == {torch.bfloat16}

    def test_gradients_of_the_input(self, pair: tuple[Any, Any]) -> None:
        gradients = []
        for model in pair:
            x = torch.linspace(-1, 1, 24).view(3, 8).requires_grad_()
            model(x).square().sum().backward()
            gradients.append(x.grad)
        torch.testing.assert_close(*gradients)

    def test_a_compiled_graph(self, pair: tuple[Any, Any]) -> None:
        torch.compiler.reset()
        x = torch.randn(2, 8)
        with torch.no_grad():
            found = torch.compile(pair[0], fullgraph=True, backend="eager")(x)
            torch.testing.assert_close(found, pair[1](x))
        torch.compiler.reset()

    def test_what_is_read_back_is_what_was_attached(
        self, pair: tuple[Any, Any], rounded: GroupFactors, bits: int
    ) -> None:
        model, plain = pair
        (entry,) = attached_factors(model)
        assert entry.bits == bits
        assert torch.equal(entry.right, rounded.right)
        of_a_rank = 8 + 15 if bits == 8 else 4 * (4 * bits + 1)  # four blocks: of the input and of three members
        assert entry.factor_bytes == rounded.factor_bytes == 3 * (of_a_rank + 4)
        with disabled(model):
            hold_as_floats(model)
            assert not any(container.bits or container.enabled for container in attached(model).values())
        attached(model)["q+k+v"].enabled = True
        x = torch.randn(3, 8)
        assert torch.equal(model(x), plain(x))


def test_left_factors_need_no_scale_of_their_own() -> None:
    """All left factors have the same fixed unit, so that cutting ranks needs no new scales for the remaining ranks."""
    assert LEFT_UNIT == 2.0**-7
