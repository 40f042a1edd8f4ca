"""Groups that are switched off and on again, on models that are run, compiled, used to generate, and saved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessor

import glowq
from glowq.errors import ConfigError
from glowq.factors.factors import GroupFactors
from glowq.runtime.attach import attach, attached
from support.tiny import corrected as corrected_llama
from support.tiny import gap, load, logits
from support.tiny import tiny_llama as saved_llama

Factory = Callable[..., Any]
GENERATE: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def corrected(tiny_llama: Factory, tiny_ids: Tensor, correct_randomly: Factory) -> tuple[Any, list[GroupFactors]]:
    """A model with a correction of every group, and the attached factors."""
    model = tiny_llama()
    return model, correct_randomly(model, tiny_ids)


@pytest.fixture
def only(tiny_llama: Factory, corrected: tuple[Any, list[GroupFactors]]) -> Callable[..., Any]:
    """A function that returns the same model with only the given groups attached."""

    def build(names: set[str]) -> Any:
        model = tiny_llama()
        for entry in corrected[1]:
            if entry.group.name in names:
                attach(model, entry)
        return model

    return build


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids).logits  # type: ignore[no-any-return]


def test_all_off_is_the_base_and_all_on_the_corrected_model(corrected: Any, only: Any, tiny_ids: Tensor) -> None:
    model, _ = corrected
    before, base = logits_of(model, tiny_ids), logits_of(only(set()), tiny_ids)
    assert not torch.allclose(before, base, atol=0.1)
    glowq.set_enabled(model, False)
    assert torch.equal(logits_of(model, tiny_ids), base)
    glowq.set_enabled(model, False)
    assert torch.equal(logits_of(model, tiny_ids), base)
    glowq.set_enabled(model, True)
    assert torch.equal(logits_of(model, tiny_ids), before)


def test_one_off_is_a_model_with_the_others_alone(corrected: Any, only: Any, tiny_ids: Tensor) -> None:
    model, factors = corrected
    before, names = logits_of(model, tiny_ids), {entry.group.name for entry in factors}
    for name in names:
        expected = logits_of(only(names - {name}), tiny_ids)
        assert not torch.equal(expected, before)
        with glowq.disabled(model, [name]) as inside:
            assert inside is model
            assert torch.equal(logits_of(model, tiny_ids), expected)
        assert torch.equal(logits_of(model, tiny_ids), before)
        glowq.set_enabled(model, False, names - {name})
        assert torch.equal(logits_of(model, tiny_ids), logits_of(only({name}), tiny_ids))
        glowq.set_enabled(model, True, names - {name})
        assert torch.equal(logits_of(model, tiny_ids), before)


def test_groups_are_switched_one_after_another(corrected: Any, only: Any, tiny_ids: Tensor) -> None:
    model, factors = corrected
    left = {entry.group.name for entry in factors}
    for name in sorted(left):
        glowq.set_enabled(model, False, name)
        left.remove(name)
        assert torch.equal(logits_of(model, tiny_ids), logits_of(only(left), tiny_ids))


def test_contexts_nest_and_leave_what_was_set(corrected: Any, only: Any, tiny_ids: Tensor) -> None:
    model, factors = corrected
    first, second, *others = (entry.group.name for entry in factors)
    glowq.set_enabled(model, False, [first])
    with glowq.disabled(model, [first, second]):
        assert torch.equal(logits_of(model, tiny_ids), logits_of(only(set(others)), tiny_ids))
        with glowq.disabled(model):
            assert torch.equal(logits_of(model, tiny_ids), logits_of(only(set()), tiny_ids))
        assert torch.equal(logits_of(model, tiny_ids), logits_of(only(set(others)), tiny_ids))
    with pytest.raises(KeyError), glowq.disabled(model, [first, second]):
        raise KeyError
    assert torch.equal(logits_of(model, tiny_ids), logits_of(only({second, *others}), tiny_ids))


def test_overlapping_contexts_leave_what_was_set(corrected: Any, tiny_ids: Tensor) -> None:
    """The first context to begin is the first to end, as happens with two threads."""
    model, factors = corrected
    on, name = logits_of(model, tiny_ids), factors[0].group.name
    first, second = glowq.disabled(model), glowq.disabled(model, [name])
    first.__enter__()
    off = logits_of(model, tiny_ids)
    second.__enter__()
    glowq.set_enabled(model, True)  # has an effect after the contexts
    assert torch.equal(logits_of(model, tiny_ids), off)
    first.__exit__(None, None, None)
    one_off = logits_of(model, tiny_ids)
    second.__exit__(None, None, None)
    assert torch.equal(logits_of(model, tiny_ids), on)
    glowq.set_enabled(model, False, [name])
    assert torch.equal(logits_of(model, tiny_ids), one_off)


def test_contexts_of_many_threads_leave_what_was_set(corrected: Any, tiny_ids: Tensor) -> None:
    model, _ = corrected
    on = logits_of(model, tiny_ids)

    def switch(times: int) -> None:
        for _ in range(times):
            with glowq.disabled(model):
                pass

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(switch, [200] * 8))
    assert torch.equal(logits_of(model, tiny_ids), on)


def test_a_group_that_is_off_computes_nothing(corrected: Any, tiny_ids: Tensor) -> None:
    model, factors = corrected
    off = factors[0].group.name
    seen: list[str] = []
    for name, container in attached(model).items():
        container.right.register_forward_hook(lambda *_, name=name: seen.append(name))
    with glowq.disabled(model, [off]):
        logits_of(model, tiny_ids)
    assert sorted(seen) == sorted(entry.group.name for entry in factors[1:])


def test_a_copy_is_switched_alone(corrected: Any, only: Any, tiny_ids: Tensor) -> None:
    model, factors = corrected
    name = factors[0].group.name
    glowq.set_enabled(model, False, [name])
    copied = copy.deepcopy(model)
    expected = logits_of(model, tiny_ids)
    glowq.set_enabled(model, True)
    assert torch.equal(logits_of(copied, tiny_ids), expected)
    assert not torch.equal(logits_of(model, tiny_ids), expected)


def test_an_unknown_name_switches_nothing(corrected: Any, tiny_ids: Tensor) -> None:
    model, _ = corrected
    before, name = logits_of(model, tiny_ids), "model.layers.0.self_attn.o_proj"
    near = rf"no correction of a group '{name[:-1]}'.*correction\.ranks.*Did you mean '{name}'\?"
    for groups in ([name, name[:-1]], name[:-1]):
        with pytest.raises(ConfigError, match=near), glowq.disabled(model, groups):
            pass
        with pytest.raises(ConfigError, match=near):
            glowq.set_enabled(model, False, groups)
    assert torch.equal(logits_of(model, tiny_ids), before)
    with pytest.raises(ConfigError, match=r"a group 'x' \(it carries those of 9 groups\).* of all groups\.$"):
        glowq.set_enabled(model, False, ["x"])


def test_a_model_without_a_correction_has_no_group_to_switch(tiny_llama: Factory) -> None:
    model = tiny_llama()
    glowq.set_enabled(model, False)
    with pytest.raises(ConfigError, match=r"it carries those of 0 groups"):
        glowq.set_enabled(model, False, ["model.layers.0.mlp.down_proj"])


def test_a_compiled_model_follows(tiny_llama: Factory, tiny_ids: Tensor, correct_randomly: Factory) -> None:
    torch.compiler.reset()
    model = tiny_llama(use_cache=False, num_hidden_layers=1)
    names = [entry.group.name for entry in correct_randomly(model, tiny_ids)]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    before = logits_of(model, tiny_ids)
    torch.testing.assert_close(logits_of(compiled, tiny_ids), before)
    for groups in ([names[0]], names[1:3], None, [names[0]]):
        with glowq.disabled(model, groups):
            expected = logits_of(model, tiny_ids)
            assert not torch.allclose(expected, before, atol=1e-2)
            torch.testing.assert_close(logits_of(compiled, tiny_ids), expected)
        torch.testing.assert_close(logits_of(compiled, tiny_ids), before)
    glowq.set_enabled(compiled, False, [names[0]])  # through the wrapper that torch.compile returns
    expected = logits_of(model, tiny_ids)
    assert not torch.allclose(expected, before, atol=1e-2)
    torch.testing.assert_close(logits_of(compiled, tiny_ids), expected)
    torch.compiler.reset()


def test_generation_is_that_of_a_model_with_the_others_alone(corrected: Any, only: Any, tiny_ids: Tensor) -> None:
    model, factors = corrected
    names = {entry.group.name for entry in factors}
    options = {**GENERATE, "return_dict_in_generate": True, "output_logits": True}
    for off in ({min(names)}, names):
        expected = only(names - off).generate(tiny_ids, **options)
        with glowq.disabled(model, off):
            found = model.generate(tiny_ids, **options)
        assert torch.equal(found.sequences, expected.sequences)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found.logits, expected.logits, strict=True))


def test_switching_between_two_tokens(corrected: Any, only: Any, tiny_ids: Tensor) -> None:
    model, factors = corrected
    names = {entry.group.name for entry in factors}
    off, at, length = {min(names), max(names)}, 3, tiny_ids.shape[1]

    class Switch(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            if input_ids.shape[1] == length + at - 1:  # after the forward of token number `at`
                glowq.set_enabled(model, False, off)
            return scores

    found = model.generate(tiny_ids, logits_processor=[Switch()], **GENERATE)
    models, cache, ids = [only(names)] * at + [only(names - off)] * 5, DynamicCache(), tiny_ids
    expected = tiny_ids
    with torch.no_grad():
        for each in models:
            ids = each(ids, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat([expected, ids], 1)
    assert torch.equal(found, expected)
    assert not torch.equal(found, only(names).generate(tiny_ids, **GENERATE))


def test_a_saved_model_keeps_the_factors_of_groups_that_are_off(tmp_path: Path) -> None:
    source = saved_llama(tmp_path / "llama")
    model, correction = corrected_llama(source, "nf4")
    expected = logits(model)
    model.save_pretrained(tmp_path / "on")
    correction.save_pretrained(tmp_path / "corr-on")
    off = list(correction.ranks)[:3]
    glowq.set_enabled(model, False, off)
    plain = logits(model)
    assert not torch.equal(plain, expected)
    model.save_pretrained(tmp_path / "off")
    correction.save_pretrained(tmp_path / "corr-off")
    assert gap(model, plain) == 0.0
    for form, file in (("", "model.safetensors"), ("corr-", "glowq.safetensors")):
        stored, expected_ = (load_file(tmp_path / f"{form}{state}" / file) for state in ("off", "on"))
        assert stored.keys() == expected_.keys()
        assert all(torch.equal(stored[key], expected_[key]) for key in stored)
    for form in ("off", "corr-off"):
        loaded = load(tmp_path / form)
        assert set(attached(loaded)) == set(correction.ranks)
        assert gap(loaded, expected) == 0.0
        with glowq.disabled(loaded, off):
            assert gap(loaded, plain) == 0.0
    glowq.set_enabled(model, True)
    assert gap(model, expected) == 0.0


def test_a_dequantized_model_leaves_out_groups_that_are_off(tmp_path: Path) -> None:
    source = saved_llama(tmp_path / "llama")
    switched, other = (corrected_llama(source, "nf4")[0] for _ in range(2))
    glowq.set_enabled(switched, False)
    assert gap(switched, logits(other)) > 0.0
    glowq.detach(other)
    assert gap(switched.dequantize(), logits(other.dequantize())) == 0.0
