"""Blocks that are recomputed in the backward pass give the same moments, need less memory and leave no changes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from glowq.calibration import output_gradients as sensitivity
from glowq.calibration.output_gradients import output_moments
from glowq.errors import NonFiniteError
from glowq.models import checkpointing as recomputing_module
from glowq.models.blocks import blocks
from glowq.models.checkpointing import kept_bytes, recomputing
from glowq.models.tracing import find_groups
from glowq.quantizers.model import prepare_model
from support.bases import Base, rows, small_model
from support.tiny import load

Factory = Callable[..., Any]


def equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("base", rows("nf4", "torchao-int4"))
def test_the_moments_of_a_quantized_model_are_the_same_bits(base: Base, token_ids: Tensor) -> None:
    model = base.load(torch.bfloat16)
    prepare_model(model)
    batches = [{"input_ids": token_ids}] * 2
    groups = find_groups(model, batches[0])
    plain, again = (output_moments(model, groups, batches, checkpoint=value) for value in (False, True))
    assert equal(plain, again)


class Kept:
    """Counts the bytes of all storages that a forward keeps for its backward pass."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}
        self._alive: list[Tensor] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        self._alive.append(tensor)  # keeps the memory, so that no address is reused
        self.storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())


def test_less_is_kept_for_the_backward_pass(token_ids: Tensor) -> None:
    model = load(small_model(), dtype=torch.float32).requires_grad_(False)
    found = []
    for context in (recomputing(model), None):
        kept = Kept()
        states = model.get_input_embeddings()(token_ids).requires_grad_()
        with saved_tensors_hooks(kept, lambda tensor: tensor):
            if context is None:
                model.model(inputs_embeds=states, use_cache=False)
            else:
                with context:
                    model.model(inputs_embeds=states, use_cache=False)
        found.append(kept.bytes)
    weights = sum(p.numel() * p.element_size() for p in model.model.layers.parameters())
    assert found[0] < 0.2 * (found[1] - weights)


def test_every_forward_is_what_it_was(tiny_llama: Factory, tiny_ids: Tensor) -> None:
    model = tiny_llama()
    first, second = (model.get_submodule(name) for name in blocks(model))
    add_hook_to_module(second, AlignDevicesHook())
    own = vars(second)["forward"]
    groups = find_groups(model, {"input_ids": tiny_ids})
    plain, again = (
        output_moments(model, groups, [{"input_ids": tiny_ids}], checkpoint=value) for value in (False, True)
    )
    assert equal(plain, again)
    assert "forward" not in vars(first)
    assert vars(second)["forward"] is own

    first.mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"holds NaN or Inf"):
        output_moments(model, groups, [{"input_ids": tiny_ids}], checkpoint=True)
    assert "forward" not in vars(first)
    assert vars(second)["forward"] is own


def test_whole_blocks_are_computed_again(tiny_llama: Factory, tiny_ids: Tensor) -> None:
    """A recomputed forward always runs to its end, because a hook may load weights before it and remove them after."""
    model, left = tiny_llama(), []
    block = model.get_submodule(blocks(model)[0])

    def record_call(forward: Any, *args: Any, **kwargs: Any) -> Any:
        found = forward(*args, **kwargs)
        left.append(True)
        return found

    block.forward = partial(record_call, block.forward)
    output_moments(model, find_groups(model, {"input_ids": tiny_ids}), [{"input_ids": tiny_ids}], checkpoint=True)
    assert len(left) == 3  # the trace, the forward, and the backward pass


def test_the_size_of_a_batch_decides(tiny_llama: Factory, tiny_ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_llama(), {"input_ids": tiny_ids}
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    widths = sum(module.in_features + module.out_features for module in linear)
    itemsize = next(model.parameters()).element_size()
    expected = 2 * widths * tiny_ids.numel() * itemsize
    assert kept_bytes(model, [batch, {"input_ids": tiny_ids[:1]}]) == expected
    entered = []
    monkeypatch.setattr(sensitivity, "recomputing", lambda model: entered.append(model) or recomputing(model))
    for limit in (expected, expected - 1):
        monkeypatch.setattr(recomputing_module, "_KEPT_BYTES", limit)
        output_moments(model, find_groups(model, batch), [batch])
    assert len(entered) == 1
