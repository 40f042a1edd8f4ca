"""A corrected model compared with dense float64 results: correct, with one shared right product that is never stale."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint

from glowq.errors import ConfigError
from glowq.runtime import operators
from glowq.runtime.attach import attach, attached, detach
from glowq.runtime.container import SharedCorrection

Factory = Callable[..., Any]
MEMBERS = ("q", "k", "v")
FEW, MANY = 3, 20  # numbers of tokens; for few tokens, one call computes the corrections of all members
MODES = [torch.enable_grad, torch.no_grad, torch.inference_mode]


def container(model: nn.Module) -> SharedCorrection:
    (only,) = attached(model).values()
    return only


def expected(model: nn.Module, member: str, x: Tensor) -> Tensor:
    """Compute x (W + A B)^T + b in float64."""
    parts = container(model)
    left = parts.lefts[MEMBERS.index(member)].factor.detach().double()
    layer = model.get_submodule(member)
    weight = layer.weight.detach().double() + left @ parts.right.factor.detach().double()
    return x.detach().double() @ weight.T + layer.bias.detach().double()


def input_gradient(model: nn.Module, member: str) -> Tensor:
    """Return the gradient of the sum of the outputs with respect to one token, float64."""
    probe = torch.cat([torch.eye(8), torch.zeros(1, 8)])
    outputs = expected(model, member, probe).sum(1)
    return outputs[:8] - outputs[8]


def is_correct(model: nn.Module, member: str, x: Tensor, y: Tensor) -> bool:
    return torch.allclose(y.double(), expected(model, member, x), rtol=0, atol=1e-5)


@contextmanager
def products(model: nn.Module) -> Iterator[list[str]]:
    """Record the name of a group each time its right product is computed."""
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
    assert is_correct(trio, "k", x, trio.k(x))
    x[0, 0] += 1
    assert is_correct(trio, "v", x, trio.v(x))


def test_a_new_tensor_at_an_old_address_is_another_input(trio: nn.Module) -> None:
    memory = np.zeros((3, 8), dtype=np.float32)
    for member in "qkvqk":
        memory[:] = torch.randn(3, 8).numpy()
        x = torch.from_numpy(memory)
        assert x.data_ptr() == memory.ctypes.data
        assert is_correct(trio, member, x, trio.get_submodule(member)(x))
        del x


@pytest.mark.parametrize(
    "calls",
    ["qq", "qqk", "vqk", "kvq", "q", "qk", "qkvqkv", "qkqv", "vvvqqq"],
)
def test_any_order_and_number_of_calls(trio: nn.Module, calls: str) -> None:
    x = torch.randn(2, 3, 8)
    for member in calls:
        assert is_correct(trio, member, x, trio.get_submodule(member)(x))


def test_two_inputs_that_alternate(trio: nn.Module) -> None:
    inputs = torch.randn(2, 3, 8).unbind(0)
    for member in "qkvqkv":
        for x in inputs:
            assert is_correct(trio, member, x, trio.get_submodule(member)(x))


def test_a_part_or_another_order_of_the_input_is_another_input(trio: nn.Module) -> None:
    x = torch.randn(4, 4, 8)
    trio.q(x)
    assert is_correct(trio, "k", x[1:], trio.k(x[1:]))
    trio.q(x)
    assert is_correct(trio, "k", x.transpose(0, 1), trio.k(x.transpose(0, 1)))
    assert is_correct(trio, "v", x.flip(0), trio.v(x.flip(0)))


@pytest.mark.parametrize("tokens", [3, 300])  # few tokens take one call for all members
@pytest.mark.parametrize("gradients", [False, True])
def test_views_of_one_input_share_the_product(trio: nn.Module, tokens: int, gradients: bool) -> None:
    x = torch.randn(2, tokens, 8)
    inputs = {"q": x.view(-1, 8), "k": x, "v": x[None]}
    for order in ("qkv", "vkq", "kvq"):
        with products(trio) as seen, torch.set_grad_enabled(gradients):
            found = {member: trio.get_submodule(member)(inputs[member]) for member in order}
        assert len(seen) == 1
        assert all(is_correct(trio, member, inputs[member], y) for member, y in found.items())
        with torch.set_grad_enabled(gradients):  # without the hooks that count
            found = {member: trio.get_submodule(member)(inputs[member]) for member in order}
        assert all(is_correct(trio, member, inputs[member], y) for member, y in found.items())
    assert container(trio)._slot == [None]


def test_a_write_through_a_view_is_seen(trio: nn.Module) -> None:
    x = torch.randn(2, 3, 8)
    trio.q(x)
    x.view(-1, 8).mul_(2)
    assert is_correct(trio, "k", x.view(-1, 8), trio.k(x.view(-1, 8)))


def test_views_of_a_tensor_that_is_gone_are_compared_with_nothing(trio: nn.Module) -> None:
    trio.q(torch.randn(2, 3, 8).view(-1, 8))
    x = torch.randn(2, 3, 8).view(-1, 8)
    assert is_correct(trio, "k", x, trio.k(x))


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
        assert not is_correct(trio, "q", x, trio.q(x))
    assert is_correct(trio, "v", x, trio.v(x))


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
        assert is_correct(trio, member, x, trio.get_submodule(member)(x))


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


@pytest.mark.parametrize(("length", "calls"), [(7, {"correction": 9}), (9, {"right": 9, "left_add_": 15})])
def test_a_group_takes_as_few_calls_as_it_can(
    tiny_llama: Factory,
    tiny_ids: Tensor,
    correct_randomly: Factory,
    monkeypatch: pytest.MonkeyPatch,
    length: int,
    calls: dict[str, int],
) -> None:
    model = tiny_llama()
    correct_randomly(model, tiny_ids)
    seen: Counter[str] = Counter()

    def record(name: str) -> None:
        function = getattr(operators, name)
        monkeypatch.setattr(operators, name, lambda *arguments: (seen.update([name]), function(*arguments))[1])

    for name in ("right", "correction", "left_add_"):
        record(name)
    with torch.no_grad():
        model(torch.arange(2 * length).reshape(2, length))
    assert seen == calls


@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("when", ["before", "after", "of every module"])
def test_an_output_that_another_hook_keeps_stays_as_it_was(
    trio: nn.Module, random_factors: Factory, mode: Any, tokens: int, when: str
) -> None:
    group = container(trio).group
    detach(trio)
    x, kept = torch.randn(tokens, 8), {}

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        kept[module] = output

    plain = {member: trio.get_submodule(member)(x).detach() for member in MEMBERS}
    if when == "after":
        attach(trio, random_factors(group))
    handles = [trio.get_submodule(member).register_forward_hook(keep) for member in MEMBERS if when[0] != "o"]
    if when != "after":
        attach(trio, random_factors(group))
    if when == "of every module":
        handles = [register_module_forward_hook(keep)]
    try:
        with mode():
            found = {member: trio.get_submodule(member)(x) for member in MEMBERS}
    finally:
        for handle in handles:
            handle.remove()
    for member, y in found.items():
        seen = kept[trio.get_submodule(member)]
        assert is_correct(trio, member, x, y)
        assert seen is y if when == "after" else torch.equal(seen, plain[member])


def saved_and_loaded(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model,
        lambda model: model.to(torch.bfloat16),
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        saved_and_loaded,
    ],
    ids=["attached", "converted", "copied", "pickled", "saved and loaded"],
)
def test_left_factors_lie_one_after_the_other(trio: nn.Module, change: Callable[[nn.Module], nn.Module]) -> None:
    trio(torch.randn(3, 8))
    model = change(trio)
    lefts = [left.factor for left in container(model).lefts]
    place = lefts[0].data_ptr()
    for left in lefts:
        assert left.data_ptr() == place
        place += left.numel() * left.element_size()
    for mode in MODES:
        for tokens in (FEW, MANY):
            with mode():
                x = torch.randn(tokens, 8, dtype=lefts[0].dtype)
                oracle = torch.cat([expected(model, member, x) for member in MEMBERS], -1)
                tolerance = 1e-5 if x.dtype == torch.float32 else 0.05
                torch.testing.assert_close(model(x).double(), oracle, rtol=0, atol=tolerance)


@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("mode", MODES)
def test_an_input_on_another_device_is_refused(trio: nn.Module, mode: Any, tokens: int) -> None:
    trio.q.to("meta")
    message = r"^q\+k\+v: its factors are on cpu, its input is on meta: move the whole model with model\.to\(device\)"
    with mode(), pytest.raises(ConfigError, match=message):
        trio.q(torch.randn(tokens, 8, device="meta"))


@pytest.mark.parametrize("mode", MODES)
def test_a_model_on_the_meta_device_computes_shapes(trio: nn.Module, mode: Any) -> None:
    trio.to("meta")
    for tokens in (FEW, MANY):
        with mode():
            found = trio(torch.randn(tokens, 8, device="meta"))
        assert (found.shape, found.is_meta) == ((tokens, 15), True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_an_empty_batch(trio: nn.Module, mode: Any, shape: tuple[int, ...]) -> None:
    with mode():
        assert trio(torch.randn(*shape, 8)).shape == (*shape, 15)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_outputs_that_autocast_leaves_in_full_precision(trio: nn.Module, mode: Any, tokens: int) -> None:
    """A quantized layer may compute in its own dtype, independent of autocast."""
    for member in MEMBERS:
        layer = trio.get_submodule(member)
        layer.forward = torch.autocast("cpu", enabled=False)(layer.forward)
    x = torch.randn(tokens, 8)
    with mode(), torch.autocast("cpu", torch.bfloat16):
        found = {member: trio.get_submodule(member)(x) for member in MEMBERS}
    for member, y in found.items():
        assert y.dtype == torch.float32
        torch.testing.assert_close(y.double(), expected(trio, member, x), rtol=0, atol=0.05)


@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("watched", MEMBERS)
def test_a_hook_on_a_factor_may_come_and_go_between_members(trio: nn.Module, tokens: int, watched: str) -> None:
    x = torch.randn(tokens, 8)
    with torch.no_grad():
        for member in ("q", "k", "v", "v", "k", "q"):
            with products(trio) if member == watched else nullcontext():
                assert is_correct(trio, member, x, trio.get_submodule(member)(x))
