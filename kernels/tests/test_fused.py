"""Corrected members that run in one launch (`glowq.runtime.fused`): their values, and the cases that do not use it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from fused_layers import (
    BASES,
    FLOATS,
    WIDTHS,
    as_before,
    check,
    check_all,
    everywhere,
    inputs,
    make_like,
    run,
)

import glowq_kernels


@pytest.mark.parametrize("tokens", [(1,), (3,), (16,), (2, 4), ()])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("base", BASES)
def test_values(
    make: Callable[..., Any],
    calls: Counter[str],
    device: torch.device,
    base: str,
    bias: bool,
    tokens: tuple[int, ...],
) -> None:
    model = make(base, bias=bias)
    check_all(base, model, inputs(*tokens, device=device))
    assert calls[BASES[base].kernel] == len(WIDTHS)
    assert not calls["left_add_"]


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("base", BASES)
def test_factors_in_blocks(
    make: Callable[..., Any],
    fused: Any,
    calls: Counter[str],
    device: torch.device,
    base: str,
    tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are held in blocks on a GPU; the CPU of triton's interpreter would hold them in int8."""
    attach = pytest.importorskip("glowq.runtime.attach")
    monkeypatch.setattr(attach, "in_bytes", lambda packed, shapes, multiple: packed)
    model = make(base, bias=True, factors=torch.uint8)
    x = inputs(tokens, device=device)
    found = run(model, x)
    assert calls[BASES[base].kernel] == len(WIDTHS)
    assert not calls["left_add_"]
    attach.hold_as_floats(model)
    assert fused.fuse(model) == len(WIDTHS)
    for one, other in zip(found, run(model, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@everywhere
@pytest.mark.parametrize("factors", [*FLOATS, torch.int8], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("tokens", [1, 3])
def test_dtypes(
    make: Callable[..., Any],
    calls: Counter[str],
    device: torch.device,
    base: str,
    dtype: torch.dtype,
    factors: torch.dtype,
    tokens: int,
) -> None:
    model = make(base, bias=True, dtype=dtype, factors=factors)
    check_all(base, model, inputs(tokens, device=device, dtype=dtype))
    assert calls[BASES[base].kernel] == len(WIDTHS)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("computed", FLOATS, ids=str)
def test_what_bitsandbytes_computes_in(
    make: Callable[..., Any], calls: Counter[str], device: torch.device, dtype: torch.dtype, computed: torch.dtype
) -> None:
    model = make("nf4", bias=True, dtype=computed)
    check_all("nf4", model, inputs(3, device=device, dtype=dtype), computed=computed)
    assert calls["nf4_linear"] == len(WIDTHS)


def test_bitsandbytes_learns_what_to_compute_in_from_its_first_input(
    make: Callable[..., Any], device: torch.device
) -> None:
    model = make("nf4", dtype=None)
    assert not model.q.compute_type_is_set
    check_all("nf4", model, inputs(3, device=device, dtype=torch.bfloat16))
    assert model.q.compute_dtype is torch.bfloat16
    check_all("nf4", model, inputs(3, device=device), computed=torch.bfloat16)


@everywhere
def test_a_launch_a_group_and_one_a_member(
    make: Callable[..., Any], calls: Counter[str], device: torch.device, base: str
) -> None:
    model, x = make(base), inputs(2, device=device)
    for _ in range(2):
        calls.clear()
        run(model, x, "qkv")
        assert calls == {"right": 1, BASES[base].kernel: 3}
        calls.clear()
        run(model, x, "o")
        assert calls == {"right": 1, BASES[base].kernel: 1}


@everywhere
def test_members_that_are_not_fused_share_the_right_product(
    make: Callable[..., Any], calls: Counter[str], device: torch.device, base: str
) -> None:
    model, x = make(base), inputs(2, device=device)
    del model.k.forward
    for order in ("qkv", "kqv"):
        for name, found in zip(order, run(model, x, order), strict=True):
            check(BASES[base], model, name, x, found) if name != "k" else None
    plain = run(model, x, "k")
    assert torch.allclose(plain[0], run(make_like(model), x, "k")[0], rtol=1e-3, atol=1e-2)
    assert calls[BASES[base].kernel] == 4


class Subclass(torch.Tensor):
    """A subclass of `torch.Tensor`."""


@everywhere
@pytest.mark.parametrize("tokens", [(17,), (2, 9), (0,), (2, 0)])
def test_many_tokens_and_none_go_the_old_way(
    make: Callable[..., Any], calls: Counter[str], device: torch.device, base: str, tokens: tuple[int, ...]
) -> None:
    as_before(make(base), calls, inputs(*tokens, device=device), torch.no_grad)


@everywhere
def test_gradients_go_the_old_way(
    make: Callable[..., Any], calls: Counter[str], device: torch.device, base: str
) -> None:
    model, x = make(base), inputs(2, device=device).requires_grad_()
    as_before(model, calls, x, nullcontext)
    sum(y.sum() for y in model(x)).backward()
    expected = sum((BASES[base].read(getattr(model, name))[0].sum(0) for name in WIDTHS), torch.zeros(()))
    from glowq.runtime.attach import attached

    for part in attached(model).values():
        for left in part.lefts:
            expected = expected + (left.factor.double() @ part.right.factor.double()).sum(0).cpu()
    torch.testing.assert_close(x.grad.double().cpu(), expected.double().expand(2, -1), rtol=1e-3, atol=1e-2)
    as_before(model, calls, x.detach(), nullcontext)


@everywhere
@pytest.mark.parametrize("case", ["autocast", "subclass", "float64", "counted", "vmap"])
def test_other_ways_to_run_go_the_old_way(
    make: Callable[..., Any], calls: Counter[str], device: torch.device, base: str, case: str
) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, x = make(base), inputs(2, device=device)
    if case == "autocast":
        with torch.no_grad():
            as_before(model, calls, x, lambda: torch.autocast(device.type, torch.bfloat16))
    elif case == "subclass":
        as_before(model, calls, x.as_subclass(Subclass), torch.no_grad)
    elif case == "float64":
        if base.startswith("gptq"):
            as_before(model, calls, x.double(), torch.no_grad)
    elif case == "counted":
        with torch.no_grad(), FlopCounterMode(display=False):
            run(model, x)
        assert not calls["nf4_linear"] + calls["gptq_linear"]
    elif base.startswith("gptq"):
        with torch.no_grad():
            found = torch.vmap(model.q)(x)
        assert not calls["gptq_linear"]
        check(BASES[base], model, "q", x, found)


@everywhere
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_compilers_see_the_library(
    make: Callable[..., Any], calls: Counter[str], device: torch.device, base: str
) -> None:
    model, x = make(base), inputs(2, device=device)
    plain = make_like(model)
    with torch.no_grad():
        expected = plain(x)
        calls.clear()
        compiled = torch.compile(model, backend="eager", fullgraph=True)(x)
        traced = torch.jit.trace(model, (x,), check_trace=False)(x)
        # bitsandbytes' own layers cannot be exported.
        exported = torch.export.export(model, (x,)).module()(x) if base.startswith("gptq") else traced
    assert not calls["nf4_linear"] + calls["gptq_linear"]
    for found in (compiled, traced, exported):
        for actual, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


@everywhere
def test_threads(make: Callable[..., Any], device: torch.device, base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(base)
    name = BASES[base].kernel
    if device.type == "cpu":  # triton's interpreter supports only one thread
        monkeypatch.setattr(glowq_kernels, name, getattr(glowq_kernels.twins, name))
    many = [inputs(2, device=device) for _ in range(16)]
    expected = [run(model, x, "qk") for x in many]
    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(lambda x: run(model, x, "qk"), many * 4), expected * 4, strict=True):
            assert all(map(torch.equal, found, wanted))


@everywhere
def test_inference_mode(make: Callable[..., Any], calls: Counter[str], device: torch.device, base: str) -> None:
    model = make(base)
    with torch.inference_mode():
        x = inputs(2, device=device)
        found = model(x, "qkv")
    for name, y in zip("qkv", found, strict=True):
        check(BASES[base], model, name, x, y)
    assert calls[BASES[base].kernel] == 3
