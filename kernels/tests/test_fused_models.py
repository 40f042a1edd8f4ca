"""Fused members in a model that is switched, detached, copied or freed, or that has other hooks and forwards."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_layers import (
    BASES,
    WIDTHS,
    as_before,
    check,
    check_all,
    corrected,
    everywhere,
    inputs,
    make_like,
    run,
)


@everywhere
def test_switched_off(make: Callable[..., Any], calls: Counter[str], device: torch.device, base: str) -> None:
    from glowq.runtime.switching import disabled, set_enabled

    model, x = make(base), inputs(2, device=device)
    before = run(model, x)
    with disabled(model, "q+k+v"):
        found = run(model, x)
        assert all(map(torch.equal, found[:3], run(make_like(model), x, "qkv")))
    assert calls[BASES[base].kernel] == 4 + 1
    assert not any(torch.equal(*pair) for pair in zip(found[:3], before[:3], strict=True))
    assert torch.equal(found[3], before[3])
    set_enabled(model, False)
    calls.clear()
    as_before(model, calls, x, torch.no_grad)
    set_enabled(model, True)
    assert all(map(torch.equal, run(model, x), before))


@everywhere
def test_detach_leaves_the_base(make: Callable[..., Any], device: torch.device, base: str) -> None:
    from glowq.runtime.attach import detach

    model, x = make(base), inputs(2, device=device)
    plain = make_like(model)
    detach(plain)
    run(model, x)
    detach(model)
    assert all(map(torch.equal, run(model, x), run(plain, x)))
    for name in WIDTHS:
        layer = getattr(model, name)
        assert "forward" not in layer.__dict__
        assert not layer._forward_hooks
    assert list(model.state_dict()) == list(plain.state_dict())


@everywhere
def test_the_state_is_what_it_was(fused: Any, device: torch.device, base: str) -> None:
    model = corrected(BASES[base], device, bias=True)
    before, names = model.state_dict(), [name for name, _ in model.named_modules()]
    fused.fuse(model)
    run(model, inputs(2, device=device))
    after = model.state_dict()
    assert [name for name, _ in model.named_modules()] == names
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@everywhere
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_is_fused_by_itself(
    make: Callable[..., Any], calls: Counter[str], device: torch.device, base: str, how: str
) -> None:
    from glowq.runtime.attach import attached, detach

    model, x = make(base), inputs(2, device=device)
    before = run(model, x)
    copied = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    calls.clear()
    assert all(map(torch.equal, run(copied, x), before))
    assert calls == {"right": 2, BASES[base].kernel: 4}
    with torch.no_grad():
        for part in attached(copied).values():
            part.right.factor.mul_(2)
        scales = copied.q.scales if base.startswith("gptq") else copied.q.weight.quant_state.state2.absmax
        scales.mul_(2)
    check_all(base, copied, x)
    check_all(base, model, x)
    assert all(map(torch.equal, run(model, x), before))
    detach(copied)
    assert "forward" not in copied.q.__dict__
    calls.clear()
    assert all(map(torch.equal, run(model, x), before))
    assert calls[BASES[base].kernel] == 4
    del model
    gc.collect()
    run(copied, x)


@everywhere
def test_a_model_is_freed_when_nobody_has_it(make: Callable[..., Any], device: torch.device, base: str) -> None:
    model = make(base)
    run(model, inputs(2, device=device))
    gone = weakref.ref(model.q), weakref.ref(model.glowq_q)
    del model
    gc.collect()  # modules of the libraries have reference cycles
    assert [part() for part in gone] == [None, None]


@everywhere
@pytest.mark.parametrize("tokens", [2, 17])
def test_hooks_of_others_see_the_corrected_output(
    fused: Any, calls: Counter[str], device: torch.device, base: str, tokens: int
) -> None:
    model, seen = corrected(BASES[base], device), []
    model.q.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    fused.fuse(model)
    x = inputs(tokens, device=device)
    (found,) = run(model, x, "q")
    assert torch.equal(seen[0], found)
    if tokens == 2:
        check(BASES[base], model, "q", x, found)
    model.q.register_forward_hook(lambda module, args, output: output + 1, prepend=True)
    (replaced,) = run(model, x, "q")
    torch.testing.assert_close(replaced, found + 1, rtol=1e-5, atol=1e-4)


@everywhere
def test_hooks_on_factors_are_called(
    make: Callable[..., Any], calls: Counter[str], device: torch.device, base: str
) -> None:
    model, x, seen = make(base), inputs(2, device=device), []
    handle = model.glowq_q.right.register_forward_hook(lambda *arguments: seen.append(1))
    run(model, x)
    assert seen
    assert calls[BASES[base].kernel] == 1
    handle.remove()
    check_all(base, model, x)


@everywhere
def test_a_wrapped_forward_is_corrected_once(
    make: Callable[..., Any], calls: Counter[str], device: torch.device, base: str
) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    from glowq.runtime.attach import detach

    model, x = make(base), inputs(2, device=device)
    plain = make_like(model)
    add_hook_to_module(model.q, AlignDevicesHook(execution_device=device))
    assert torch.equal(run(model, x, "q")[0], run(plain, x, "q")[0])
    assert not calls[BASES[base].kernel]
    detach(plain)
    detach(model)
    assert torch.equal(run(model, x, "q")[0], run(plain, x, "q")[0])
    remove_hook_from_module(model.q)
    assert torch.equal(run(model, x, "q")[0], run(plain, x, "q")[0])


@everywhere
@pytest.mark.parametrize("offload", [False, True])
def test_what_accelerate_dispatched(fused: Any, device: torch.device, base: str, offload: bool) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    from glowq.runtime.attach import detach

    model, x = corrected(BASES[base], device), inputs(2, device=device)
    hook = AlignDevicesHook(execution_device=device)
    add_hook_to_module(model.q, hook)
    hook.offload = offload  # glowq reads this attribute; no weight is moved
    theirs = model.q.forward
    assert fused.fuse(model) == len(WIDTHS) - offload
    assert fused.is_fused(model.q) != offload
    hook.offload = False
    check_all(base, model, x) if not offload else None
    copied = copy.deepcopy(model)
    detach(model)
    assert model.q.forward is theirs
    detach(copied)
    assert copied.q.forward.args == (copied.q,)
    remove_hook_from_module(model.q)


def test_a_direct_call_of_forward_settles_nothing_else(make: Callable[..., Any], device: torch.device) -> None:
    model, x = make("nf4"), inputs(2, device=device)
    with torch.no_grad():
        model.q.forward(x)
        del model.q.forward  # the class's forward replaces it, so the hook must add the correction
        found = model.q(inputs(2, device=device))
        again = model.q(x)
    assert not torch.equal(found, again)
    torch.testing.assert_close(again, run(make_like(model), x, "q")[0])
