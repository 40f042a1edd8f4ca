"""A corrected model against dense float64 oracles: right, shared once, never stale, and removable."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from glowq.runtime import SharedCorrection, attach, attached, detach

Factory = Callable[..., Any]
MEMBERS = ("q", "k", "v")


def container(model: nn.Module) -> SharedCorrection:
    (only,) = attached(model).values()
    return only


def expected(model: nn.Module, member: str, x: Tensor) -> Tensor:
    """x (W + A B)^T + b in float64."""
    parts = container(model)
    left = parts.lefts[MEMBERS.index(member)].factor.detach().double()
    layer = model.get_submodule(member)
    weight = layer.weight.detach().double() + left @ parts.right.factor.detach().double()
    return x.detach().double() @ weight.T + layer.bias.detach().double()


def input_gradient(model: nn.Module, member: str) -> Tensor:
    """Gradient of the sum of the outputs with respect to one token, float64."""
    probe = torch.cat([torch.eye(8), torch.zeros(1, 8)])
    outputs = expected(model, member, probe).sum(1)
    return outputs[:8] - outputs[8]


def right(model: nn.Module, member: str, x: Tensor, y: Tensor) -> bool:
    return torch.allclose(y.double(), expected(model, member, x), rtol=0, atol=1e-5)


@contextmanager
def products(model: nn.Module) -> Iterator[list[str]]:
    """Names of the groups whose right product was computed, one entry each time."""
    seen: list[str] = []
    handles = [
        part.right.register_forward_hook(lambda *_, name=name: seen.append(name))
        for name, part in attached(model).items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def test_a_corrected_llama_equals_the_dense_one(
    tiny_llama: Factory, tiny_ids: Tensor, correct_randomly: Factory, fold: Factory, device: torch.device
) -> None:
    model, dense = tiny_llama().to(device), tiny_llama()
    plain = dense(tiny_ids).logits
    factors = correct_randomly(model, tiny_ids.to(device))
    assert len(factors) == 2 * 4 + 1
    found = model(tiny_ids.to(device)).logits.cpu()
    oracle = fold(dense.double(), factors)(tiny_ids).logits.float()
    torch.testing.assert_close(found, oracle, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, plain, atol=0.1)


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_factor_dtype_works_in_every_model_dtype(
    trio: nn.Module, random_factors: Factory, model_dtype: torch.dtype, factor_dtype: torch.dtype
) -> None:
    group = container(trio).group
    detach(trio)
    trio.to(model_dtype)
    attach(trio, random_factors(group), dtype=factor_dtype)
    x = torch.randn(3, 8, dtype=model_dtype)
    exact = factor_dtype == model_dtype == torch.float32
    for member in MEMBERS:
        y = trio.get_submodule(member)(x)
        assert y.dtype == model_dtype
        error = (y.double() - expected(trio, member, x)).abs().max()
        assert error <= (1e-5 if exact else 0.05)


@pytest.mark.parametrize("mode", ["grad", "no_grad", "autocast", "grad of the input", "training"])
def test_one_right_product_a_group_and_forward(
    tiny_llama: Factory, tiny_ids: Tensor, correct_randomly: Factory, mode: str
) -> None:
    model = tiny_llama()
    factors = correct_randomly(model, tiny_ids)
    model.train(mode == "training")
    inputs: dict[str, Any] = {"input_ids": tiny_ids}
    if mode == "grad of the input":
        inputs = {"inputs_embeds": model.get_input_embeddings()(tiny_ids).detach().requires_grad_()}
    with (
        products(model) as seen,
        torch.set_grad_enabled(mode != "no_grad"),
        torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"),
    ):
        for count in (1, 2):
            model(**inputs)
            assert sorted(seen) == sorted([entry.group.name for entry in factors] * count)
    assert all(part._slot == [None] for part in attached(model).values())


def test_a_write_into_the_input_is_seen(trio: nn.Module) -> None:
    x = torch.randn(3, 8)
    trio.q(x)
    x.mul_(2)
    assert right(trio, "k", x, trio.k(x))
    x[0, 0] += 1
    assert right(trio, "v", x, trio.v(x))


def test_a_new_tensor_at_an_old_address_is_another_input(trio: nn.Module) -> None:
    memory = np.zeros((3, 8), dtype=np.float32)
    for member in "qkvqk":
        memory[:] = torch.randn(3, 8).numpy()
        x = torch.from_numpy(memory)
        assert x.data_ptr() == memory.ctypes.data
        assert right(trio, member, x, trio.get_submodule(member)(x))
        del x


@pytest.mark.parametrize(
    "calls",
    ["qq", "qqk", "vqk", "kvq", "q", "qk", "qkvqkv", "qkqv", "vvvqqq"],
)
def test_any_order_and_number_of_calls(trio: nn.Module, calls: str) -> None:
    x = torch.randn(2, 3, 8)
    for member in calls:
        assert right(trio, member, x, trio.get_submodule(member)(x))


def test_two_inputs_that_alternate(trio: nn.Module) -> None:
    inputs = torch.randn(2, 3, 8).unbind(0)
    for member in "qkvqkv":
        for x in inputs:
            assert right(trio, member, x, trio.get_submodule(member)(x))


def test_a_view_of_the_input_is_another_input(trio: nn.Module) -> None:
    x = torch.randn(4, 8)
    trio.q(x)
    assert right(trio, "k", x[1:], trio.k(x[1:]))
    assert right(trio, "v", x.flip(0), trio.v(x.flip(0)))


def test_inference_mode_shares_nothing_and_is_right(trio: nn.Module) -> None:
    with torch.inference_mode(), products(trio) as seen:
        x = torch.randn(3, 8)
        for member in "qkv":
            found = trio.get_submodule(member)(x)
            assert torch.allclose(found.double(), expected(trio, member, x), atol=1e-5)
            x.add_(1)
    assert len(seen) == 3
    assert container(trio)._slot == [None]


def test_a_product_without_a_graph_is_not_used_where_gradients_are_wanted(trio: nn.Module) -> None:
    x = torch.randn(3, 8, requires_grad=True)
    with torch.no_grad():
        trio.q(x)
    trio.k(x).sum().backward()
    torch.testing.assert_close(x.grad.double(), input_gradient(trio, "k").expand(3, 8), rtol=0, atol=1e-5)


def test_a_half_precision_product_is_not_used_outside_of_autocast(trio: nn.Module) -> None:
    x = torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert not right(trio, "q", x, trio.q(x))
    assert right(trio, "v", x, trio.v(x))


def test_an_input_that_asks_for_gradients_later_gets_all_of_them(trio: nn.Module) -> None:
    x = torch.randn(3, 8)
    trio.q(x)
    trio.k(x.requires_grad_()).sum().backward()
    torch.testing.assert_close(x.grad.double(), input_gradient(trio, "k").expand(3, 8), rtol=0, atol=1e-5)


def test_members_whose_gradients_are_taken_one_by_one(trio: nn.Module) -> None:
    x = torch.randn(3, 8, requires_grad=True)
    for member in MEMBERS:
        trio.get_submodule(member)(x).sum().backward()
    alone = x.grad.clone()
    x.grad = None
    trio(x).sum().backward()
    torch.testing.assert_close(x.grad, alone, rtol=1e-5, atol=1e-5)


def test_an_error_between_members_leaves_no_wrong_result(trio: nn.Module) -> None:
    x = torch.randn(3, 8)
    trio.q(x)
    with pytest.raises(RuntimeError):
        trio.k(torch.randn(3, 9))
    x.add_(1)
    for member in "kqv":
        assert right(trio, member, x, trio.get_submodule(member)(x))


def test_the_slot_keeps_no_input_alive(trio: nn.Module) -> None:
    x = torch.randn(3, 8)
    trio.q(x)
    watch = weakref.ref(x)
    del x
    gc.collect()
    assert watch() is None
    trio(torch.randn(3, 8))
    assert container(trio)._slot == [None]


def test_threads_do_not_mix_their_inputs(trio: nn.Module) -> None:
    def work(seed: int) -> bool:
        generator = torch.Generator().manual_seed(seed)
        good = True
        for _ in range(60):
            x = torch.randn(5, 8, generator=generator)
            with torch.no_grad():
                found = trio(x)
            oracle = torch.cat([expected(trio, member, x) for member in MEMBERS], -1)
            good = good and torch.allclose(found.double(), oracle, atol=1e-5)
        return good

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_input_gradients_equal_the_dense_ones_also_when_checkpointed(
    tiny_llama: Factory, tiny_ids: Tensor, correct_randomly: Factory, fold: Factory
) -> None:
    model = tiny_llama()
    factors = correct_randomly(model, tiny_ids, scale=0.1)
    embeddings = model.get_input_embeddings()(tiny_ids).detach()

    def gradient(of: nn.Module) -> Tensor:
        x = embeddings.to(next(of.parameters()).dtype).clone().requires_grad_()
        of(inputs_embeds=x).logits.square().mean().backward()
        return x.grad

    plain = gradient(model)
    torch.testing.assert_close(
        plain.double(), gradient(fold(tiny_llama().double(), factors)), rtol=1e-3, atol=1e-3 * float(plain.abs().max())
    )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    torch.testing.assert_close(gradient(model), plain)


def test_checkpointing_a_group_whole_gives_the_same_gradients(trio: nn.Module) -> None:
    x = torch.randn(3, 8, requires_grad=True)
    (plain,) = torch.autograd.grad(trio(x).square().sum(), x)
    for reentrant in (False, True):
        (again,) = torch.autograd.grad(trio(x).square().sum(), x)
        x.grad = None
        checkpoint(trio, x, use_reentrant=reentrant).square().sum().backward()
        torch.testing.assert_close(x.grad, plain)
        torch.testing.assert_close(again, plain)
