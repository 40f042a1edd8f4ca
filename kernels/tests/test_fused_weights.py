"""Which weights are fused, and that a changed weight is never read with its old values."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fused_layers import (
    BASES,
    FLOATS,
    INPUTS,
    WIDTHS,
    Layers,
    check_all,
    corrected,
    everywhere,
    gptq,
    inputs,
    make_like,
    run,
)

import glowq_kernels


def test_another_weight_of_bitsandbytes(make: Callable[..., Any], device: torch.device) -> None:
    model, other, x = make("nf4-double"), make("nf4-double"), inputs(2, device=device)
    run(model, x)
    model.q.weight = other.q.weight
    check_all("nf4-double", model, x)
    state = model.k.weight.quant_state
    with torch.no_grad():
        state.state2.absmax.mul_(3)
    check_all("nf4-double", model, x)
    state.absmax = state.absmax.flip(0)
    check_all("nf4-double", model, x)
    state.state2 = copy.deepcopy(state.state2)
    state.state2.code = state.state2.code * 2
    check_all("nf4-double", model, x)
    model.v.weight.data = model.v.weight.data.flip(0)
    check_all("nf4-double", model, x)


def test_another_weight_of_gptqmodel(make: Callable[..., Any], device: torch.device) -> None:
    model, x = make("gptq"), inputs(2, device=device)
    run(model, x)
    model.q.g_idx = model.q.g_idx[torch.randperm(INPUTS)]
    model.q._stream_reset_cache()
    check_all("gptq", model, x)
    model.k.g_idx.copy_(model.k.g_idx.flip(0))
    model.k._stream_reset_cache()
    check_all("gptq", model, x)
    for name in ("qweight", "scales"):
        setattr(model.v, name, getattr(model.v, name).flip(0).contiguous())
    check_all("gptq", model, x)
    model.o.load_state_dict({**model.o.state_dict(), "scales": model.o.scales * 2})
    check_all("gptq", model, x)


@everywhere
def test_tensors_of_inference_mode_do_not_count_what_is_written_to_them(
    make: Callable[..., Any], device: torch.device, base: str
) -> None:
    model, x = make(base), inputs(2, device=device)
    with torch.inference_mode():
        if base.startswith("gptq"):
            model.q.g_idx = model.q.g_idx.clone()
        else:
            model.q.weight.quant_state.state2.absmax = model.q.weight.quant_state.state2.absmax.clone()
    check_all(base, model, x)
    with torch.inference_mode():
        if base.startswith("gptq"):
            model.q.g_idx.copy_(model.q.g_idx.flip(0))
            model.q._stream_reset_cache()
        else:
            model.q.weight.quant_state.state2.absmax.mul_(2)
    check_all(base, model, x)


def test_an_index_that_names_no_group(make: Callable[..., Any], calls: Counter[str], device: torch.device) -> None:
    model = make("gptq-act-order")
    model.q.g_idx[0] = -1  # the library reads this as the last group
    model.q._stream_reset_cache()
    run(model, inputs(2, device=device), "q")
    assert not calls["gptq_linear"]


def test_a_weight_that_moves_away(make: Callable[..., Any], calls: Counter[str], device: torch.device) -> None:
    model, x = make("gptq"), inputs(2, device=device, dtype=torch.bfloat16)
    model.to(torch.bfloat16)
    check_all("gptq", model, x)
    calls.clear()
    model.to("meta")
    assert [y.shape[-1] for y in run(model, x.to("meta"))] == list(WIDTHS.values())
    assert not calls["gptq_linear"]


def test_a_weight_of_bitsandbytes_that_moves(make: Callable[..., Any], device: torch.device) -> None:
    model, x = make("nf4-double", dtype=torch.bfloat16), inputs(2, device=device, dtype=torch.bfloat16)
    run(model, x)
    model.to(torch.bfloat16)
    for name in WIDTHS:
        layer = getattr(model, name)
        layer.weight = layer.weight.to(device)
    check_all("nf4-double", model, x)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_storage_of_bitsandbytes(make: Callable[..., Any], device: torch.device, dtype: torch.dtype) -> None:
    model, x = make("nf4"), inputs(2, device=device)
    for name in WIDTHS:
        weight = getattr(model, name).weight
        weight.data = weight.data.view(1, -1).view(dtype).view(-1, 1)
    check_all("nf4", model, x)


def test_what_no_kernel_reads(fused: Any, device: torch.device) -> None:
    assert fused.fuse(corrected(gptq(32, bits=8), device)) == 0
    assert fused.fuse(corrected(BASES["nf4"], device, inputs=96)) == 0  # a row ends inside a block
    model = corrected(BASES["gptq"], device, factors=torch.float64)
    assert fused.fuse(model) == 0
    model = corrected(BASES["nf4"], device)
    model.q.weight.quant_state.packing_format_for_cpu = True
    model.k.weight.quant_state.code = model.k.weight.quant_state.code.double()  # the kernel refuses float64
    model.v.weight.quant_state = None
    assert fused.fuse(model) == 1
    model = corrected(BASES["gptq"], device)
    model.q.linear_mode = "inference"
    model.k.online_full_had = True
    model.v.adapter = object()
    assert fused.fuse(model) == 1


def test_a_weight_that_the_kernel_refuses_later(
    make: Callable[..., Any], calls: Counter[str], device: torch.device
) -> None:
    model, x = make("gptq"), inputs(2, device=device)
    model.q.scales = model.q.scales.t().contiguous().t()
    as_strided = run(model, x, "q")[0]
    assert torch.equal(as_strided, run(make_like(model), x, "q")[0])


def test_modules_that_are_not_corrected(fused: Any, device: torch.device) -> None:
    model = Layers()
    model.q = BASES["gptq"].make(INPUTS, 64, False, torch.float32).to(device)
    model.k = torch.nn.Linear(4, 4)
    assert fused.fuse(model) == 0
    assert not fused.is_fused(model.q)


@everywhere
def test_use_fast_kernels(fused: Any, calls: Counter[str], device: torch.device, base: str) -> None:
    from glowq.quantizers.model import read_weight
    from glowq.runtime.fast_kernels import refuse_rewritten, use_fast_kernels

    model, x = corrected(BASES[base], device), inputs(2, device=device)
    assert use_fast_kernels(model) == len(WIDTHS)
    assert use_fast_kernels(model) == 0
    refuse_rewritten(model)
    calls.clear()
    check_all(base, model, x)
    assert calls[BASES[base].kernel] == len(WIDTHS)
    many = inputs(20, device=device)
    run(model, many)
    backend = fused.find_backend(model.q)
    weight = read_weight(backend, "q", model.q).double().cpu()
    torch.testing.assert_close(weight, BASES[base].read(model.q)[0], rtol=1e-3, atol=1e-6)


@everywhere
def test_a_fused_weight_is_not_handed_to_kernels_that_rewrite_it(
    fused: Any, device: torch.device, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glowq.runtime.fast_kernels import refuse_rewritten, use_fast_kernels

    model, settings = corrected(BASES[base], device), {"support_avx512bf16_for_cpu": False, "linear_mode": "train"}
    if base.startswith("nf4"):
        monkeypatch.setattr("bitsandbytes.functional.has_avx512bf16", lambda: True)
    for name in WIDTHS:
        vars(getattr(model, name)).update(settings)
    assert use_fast_kernels(model) == len(WIDTHS)
    assert all(vars(getattr(model, name)).items() >= settings.items() for name in WIDTHS)
    refuse_rewritten(model)


def test_on_a_gpu_there_is_nothing_to_release(fused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    monkeypatch.setattr(functional, "has_avx512bf16", lambda: True)
    for base, part in (("nf4", "weight"), ("gptq", "qweight")):
        model = corrected(BASES[base], torch.device("cpu"))
        model.q.linear_mode = "train"
        backend = fused.find_backend(model.q)
        elsewhere = SimpleNamespace(**{part: torch.empty(0, device="meta")}, linear_mode="train")
        assert not backend.release(elsewhere)
        assert backend.release(model.q)


def test_without_triton(fused: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model = corrected(BASES["nf4"], device)
    fused.products.kernels.cache_clear()
    monkeypatch.setattr(glowq_kernels, "unavailable", lambda: "triton is missing.")
    try:
        with pytest.warns(UserWarning, match=r"triton is missing\. pip install"):
            assert fused.fuse(model) == 0
        assert fused.fuse(model) == 0
    finally:
        fused.products.kernels.cache_clear()


def test_no_device_for_the_kernels(fused: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model = corrected(BASES["nf4"], torch.device("cpu"))
    monkeypatch.setattr(fused, "_interpreted", lambda: False)
    assert fused.fuse(model) == 0
