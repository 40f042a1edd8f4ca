"""An attached correction: copying, pickling and detaching the model, and libraries that wrap its modules."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glowq.errors import ConfigError, UnsupportedModuleError
from glowq.factors.factors import GroupFactors
from glowq.factors.group import Group
from glowq.factors.integers import round_factors
from glowq.quantizers.model import prepare_model
from glowq.runtime.attach import _execution_device, attach, attached, attached_factors, detach
from glowq.runtime.container import SharedCorrection
from glowq.runtime.switching import disabled
from support.bases import Base, rows

Factory = Callable[..., Any]


def container(model: nn.Module) -> SharedCorrection:
    (only,) = attached(model).values()
    return only


def pickled(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copy_is_equal_and_independent(trio: nn.Module, duplicate: Callable[[Any], Any]) -> None:
    x = torch.randn(3, 8)
    trio.q(x)  # a stored right product must not be copied
    copied = duplicate(trio)
    assert container(copied)._slot == [None]
    corrected = trio(x)
    assert torch.equal(copied(x), corrected)
    with torch.no_grad():
        container(copied).right.factor.zero_()
    assert torch.equal(trio(x), corrected)
    with disabled(trio):
        plain = trio(x)
    assert torch.equal(copied(x), plain)
    detach(copied)
    assert torch.equal(copied(x), plain)
    assert not torch.equal(trio(x), plain)


def test_disabled_nests_and_survives_exceptions(trio: nn.Module) -> None:
    x = torch.randn(3, 8)
    corrected = trio(x)
    with disabled(trio) as inside:
        assert inside is trio
        plain = trio(x)
        with disabled(trio):
            assert torch.equal(trio(x), plain)
        assert torch.equal(trio(x), plain)
    assert torch.equal(trio(x), corrected)
    assert not torch.allclose(plain, corrected)
    with pytest.raises(KeyError), disabled(trio):
        raise KeyError
    assert torch.equal(trio(x), corrected)


def test_detach_leaves_nothing(tiny_llama: Factory, tiny_ids: Tensor, correct_randomly: Factory) -> None:
    model = tiny_llama()
    before, keys = model(tiny_ids).logits, list(model.state_dict())
    names = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters()]
    correct_randomly(model, tiny_ids)
    assert [key for key in model.state_dict() if ".glowq_" not in f".{key}"] == keys
    assert not any(key.endswith("weight") for key in set(model.state_dict()) - set(keys))
    detach(model)
    assert torch.equal(model(tiny_ids).logits, before)
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == names
    assert [name for name, _ in model.named_parameters()] == parameters
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    detach(model)


def test_a_group_is_attached_once(trio: nn.Module, random_factors: Factory) -> None:
    with pytest.raises(ConfigError, match=r"'q\+k\+v' carries a correction already; call glowq.detach"):
        attach(trio, random_factors(container(trio).group))
    group = container(trio).group
    detach(trio)
    attach(trio, random_factors(group))
    assert container(trio).group == group


def test_sizes_of_factors(random_factors: Factory) -> None:
    factors: GroupFactors = random_factors(Group("q+k", ("q", "k"), 8, (6, 4), ""), rank=3, dtype=torch.bfloat16)
    assert factors.rank == 3
    assert factors.factor_bytes == 2 * 3 * (8 + 6 + 4)


@pytest.fixture
def corrected(tiny_llama: Factory, tiny_ids: Tensor, correct_randomly: Factory) -> Any:
    model = tiny_llama()
    correct_randomly(model, tiny_ids)
    return model


def lora(**changes: Any) -> Any:
    peft = pytest.importorskip("peft")
    settings = {"r": 2, "lora_alpha": 4, "init_lora_weights": False, "target_modules": ["q_proj", "down_proj"]}
    return peft.LoraConfig(**(settings | changes))


def test_lora_rides_on_top(corrected: Any, tiny_ids: Tensor, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    before = corrected(tiny_ids).logits
    bare = copy.deepcopy(corrected)
    tuned = peft.get_peft_model(corrected, lora()).eval()
    adapted = tuned(tiny_ids).logits
    assert not torch.allclose(adapted, before, atol=1e-2)
    with tuned.disable_adapter():
        assert torch.equal(tuned(tiny_ids).logits, before)
    tuned.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(bare, tmp_path).eval()
    assert torch.equal(again(tiny_ids).logits, adapted)
    assert not any("glowq_" in key for key in peft.get_peft_model_state_dict(tuned))
    assert torch.equal(tuned.unload()(tiny_ids).logits, before)


def test_lora_wraps_no_factor_and_trains_alone(corrected: Any, tiny_ids: Tensor) -> None:
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(corrected, lora(target_modules="all-linear"))
    wrapped = [name for name, module in tuned.named_modules() if hasattr(module, "lora_A")]
    assert len(wrapped) == 2 * 7
    assert not any("glowq_" in name for name in wrapped)
    tuned(tiny_ids, labels=tiny_ids).loss.backward()
    trained = [name for name, parameter in tuned.named_parameters() if parameter.grad is not None]
    assert len(trained) == 2 * len(wrapped)
    assert all("lora_" in name for name in trained)


def test_merged_lora_equals_unmerged(corrected: Any, tiny_ids: Tensor) -> None:
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(corrected, lora()).eval()
    adapted = tuned(tiny_ids).logits
    torch.testing.assert_close(tuned.merge_and_unload()(tiny_ids).logits, adapted, rtol=1e-4, atol=1e-4)


def offloaded(model: nn.Module, where: str, folder: Path) -> nn.Module:
    from accelerate import cpu_offload, disk_offload

    if where == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, str(folder), execution_device=torch.device("cpu"))
    return model


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_a_corrected_model_can_be_offloaded(corrected: Any, tiny_ids: Tensor, where: str, tmp_path: Path) -> None:
    with torch.no_grad():
        before = corrected(tiny_ids).logits
        offloaded(corrected, where, tmp_path)
        part = next(iter(attached(corrected).values()))
        assert part.right.factor.is_meta
        assert part.lefts[0].factor.is_meta
        assert torch.equal(corrected(tiny_ids).logits, before)
        assert part.right.factor.is_meta


def test_a_corrected_model_can_be_dispatched_over_devices(corrected: Any, tiny_ids: Tensor, tmp_path: Path) -> None:
    from accelerate import dispatch_model

    with torch.no_grad():
        before = corrected(tiny_ids).logits
        device_map = {name: "cpu" for name, _ in corrected.named_children()} | {"model.layers.1": "disk"}
        del device_map["model"]
        device_map |= {f"model.{name}": "cpu" for name, _ in corrected.model.named_children() if name != "layers"}
        device_map |= {"model.layers.0": "cpu"}
        dispatch_model(corrected, device_map, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)
        assert next(corrected.model.layers[1].parameters()).is_meta
        assert torch.equal(corrected(tiny_ids).logits, before)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_an_offloaded_model_can_be_corrected(
    corrected: Any, tiny_llama: Factory, tiny_ids: Tensor, correct_randomly: Factory, where: str, tmp_path: Path
) -> None:
    model = offloaded(tiny_llama(), where, tmp_path)
    with torch.no_grad():
        plain = model(tiny_ids).logits
        correct_randomly(model, tiny_ids)
        assert torch.equal(model(tiny_ids).logits, corrected(tiny_ids).logits)
        assert not any(parameter.is_meta for parameter in next(iter(attached(model).values())).parameters())
        detach(model)
        assert torch.equal(model(tiny_ids).logits, plain)


@pytest.mark.parametrize("base", rows("nf4-double", "int8", "torchao-int4"))
def test_a_quantized_model_is_corrected_by_the_same_amount(
    base: Base, token_ids: Tensor, random_factors: Factory, tmp_path: Path
) -> None:
    model = base.load()
    prepare_model(model)
    name = "model.layers.1.self_attn"
    members = tuple(f"{name}.{part}_proj" for part in "qkv")
    entry = random_factors(Group(f"{name}.q_proj+k_proj+v_proj", members, 256, (256, 128, 128), ""))
    keys = list(model.state_dict())
    x = torch.randn(2, 5, 256)
    with torch.no_grad():
        plain = [model.get_submodule(member)(x) for member in members]
        logits = model(token_ids[:1, :8]).logits
        attach(model, entry)
        for member, before in zip(members, plain, strict=True):
            added = (x.double() @ entry.right.double().T @ entry.lefts[member].double().T).float()
            torch.testing.assert_close(model.get_submodule(member)(x), before + added, rtol=1e-5, atol=1e-4)
        assert [key for key in model.state_dict() if "glowq_" not in key] == keys
        assert not torch.equal(model(token_ids[:1, :8]).logits, logits)
        detach(model)
        assert torch.equal(model(token_ids[:1, :8]).logits, logits)


def test_factors_in_shared_memory_stay_there(trio: nn.Module) -> None:
    trio.share_memory()
    assert all(parameter.is_shared() for parameter in container(trio).parameters())
    x = torch.randn(3, 8)
    before = trio(x)
    assert all(parameter.is_shared() for parameter in container(trio).parameters())
    torch.testing.assert_close(copy.deepcopy(trio)(x), before)


def test_a_member_that_is_called_by_keyword(trio: nn.Module) -> None:
    x = torch.randn(3, 8)
    expected = [member(x) for member in (trio.q, trio.k, trio.v)]
    assert all(
        torch.equal(member(input=x), output) for member, output in zip((trio.q, trio.k, trio.v), expected, strict=True)
    )
    trio.q(x)  # the right product of a call by position also serves a call by keyword
    assert torch.equal(trio.k(input=x), expected[1])
    assert container(trio)._slot[0] is not None
    assert torch.equal(trio.v(x), expected[2])
    assert container(trio)._slot == [None]


def test_a_member_whose_input_cannot_be_told(trio: nn.Module) -> None:
    trio.q.forward = lambda input, scale: input[..., :1] * scale
    with pytest.raises(UnsupportedModuleError, match=r"q\+k\+v.*got 2 tensors.*one tensor by position"):
        trio.q(input=torch.randn(3, 8), scale=torch.ones(1))


def test_a_compiled_member_that_is_called_by_keyword(trio: nn.Module) -> None:
    x = torch.randn(3, 8)
    expected = trio.q(x)
    compiled = torch.compile(lambda x: trio.q(input=x), fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), expected, atol=1e-6)


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("int8", [False, True])
def test_changing_the_model_leaves_the_factors_that_were_attached(
    members: int, int8: bool, trio: nn.Module, random_factors: Factory
) -> None:
    detach(trio)
    names, widths = ("q", "k", "v")[:members], (6, 4, 5)[:members]
    factors: GroupFactors = random_factors(Group("+".join(names), names, 8, widths, ""))
    if int8:
        right, lefts = round_factors(factors.right, factors.lefts)
        factors = replace(factors, right=right, lefts=lefts, bits=8)
    else:  # left factors in adjacent memory, as in a corrected model
        lefts = dict(zip(names, torch.cat(list(factors.lefts.values())).split(widths), strict=True))
        factors = replace(factors, lefts=lefts)
    before = copy.deepcopy(factors)
    held = attach(trio, factors)
    whole, *_ = held._together.tensors()
    assert whole.data_ptr() == held.lefts[0].factor.data_ptr()  # still in adjacent memory
    with torch.no_grad():
        for parameter in trio.parameters():
            parameter.zero_()
    assert torch.equal(factors.right, before.right)
    assert all(torch.equal(factors.lefts[name], before.lefts[name]) for name in names)


@pytest.mark.parametrize(
    ("found", "expected"),
    [("xpu", "xpu:1"), ("cuda", "cuda:1"), (None, "cuda:1")],
    ids=["xpu", "cuda", "none"],
)
def test_a_device_that_accelerate_counts_is_one_of_the_accelerator_that_is_there(
    found: str | None, expected: str, trio: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = None if found is None else torch.device(found)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: there)
    trio.q._hf_hook = SimpleNamespace(execution_device=1)
    assert _execution_device(trio.q) == torch.device(expected)


class Called(nn.Module):
    """Two layers in a Sequential, which calls whatever it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def test_layers_in_a_sequential(random_factors: Factory) -> None:
    """The container was put into the Sequential, which then called it."""
    model, x = Called(), torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    for name in ("layers.0", "layers.2"):
        group = Group(name, (name,), 8, (8,), name)
        attach(model, random_factors(group, 2))
    found, first, second = model(x), *attached_factors(model)
    (left,), (other,) = first.lefts.values(), second.lefts.values()
    hidden = F.relu(model.layers[0].weight @ x.T + model.layers[0].bias[:, None] + left @ (first.right @ x.T))
    expected = model.layers[2].weight @ hidden + model.layers[2].bias[:, None] + other @ (second.right @ hidden)
    torch.testing.assert_close(found, expected.T)
    detach(model)
    assert [name for name, _ in model.named_modules()] == ["", "layers", "layers.0", "layers.1", "layers.2"]


def test_a_module_that_is_replaced_keeps_its_members_corrections(trio: nn.Module, random_factors: Factory) -> None:
    """As BigBird's own code replaces its attention: the corrections were not saved any more."""
    before = {name: container.group for name, container in attached(trio).items()}
    assert before
    for parent in list(trio.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, SharedCorrection):
                del parent._modules[name]
    assert {name: container.group for name, container in attached(trio).items()} == before
    assert len(attached_factors(trio)) == len(before)
    detach(trio)
    assert attached(trio) == {}
    assert not any(module._forward_hooks for module in trio.modules())
