"""Models inside of other modules: a compiled model is corrected, the others are refused with what to give instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import glowq
from glowq.errors import UnsupportedModuleError
from support.tiny import CHEAP, IDS, correct, corrected, gap, logits, quantized, tiny_llama

BASE = "torchao-int4"
LORA = LoraConfig(target_modules=["q_proj"], r=2)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("wrappers") / "full", num_hidden_layers=1, dtype=torch.float32)


@pytest.fixture(scope="module")
def saved(source: Path) -> Path:
    _, correction = corrected(source, BASE, **CHEAP)
    correction.save_pretrained(source.parent / "correction")
    return source.parent / "correction"


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def compiled_in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def compiled_forward(model: Any) -> Any:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


@pytest.mark.parametrize("compile", [compiled, compiled_in_place, compiled_forward])
def test_a_compiled_model_is_grouped_corrected_and_loaded(
    compile: Callable[[Any], Any], source: Path, saved: Path
) -> None:
    plain = quantized(source, BASE)
    groups = glowq.find_groups(plain, {"input_ids": IDS})
    before = logits(plain)
    expected = correct(plain, source, **CHEAP)

    model = compile(quantized(source, BASE))
    assert gap(model, before) < 1e-4
    assert glowq.find_groups(model, {"input_ids": IDS}) == groups
    correction = correct(model, source, **CHEAP)
    assert correction.ranks == expected.ranks
    assert correction.config.groups == expected.config.groups
    assert gap(model, logits(plain)) < 1e-4  # the graph of before is not used again
    glowq.detach(model)
    assert gap(model, before) < 1e-4
    glowq.load_correction(model, saved)
    assert gap(model, logits(plain)) < 1e-4


def test_a_corrected_compiled_model_is_saved_whole(source: Path, tmp_path: Path) -> None:
    model = compiled(quantized(source, BASE))
    correct(model, source, **CHEAP)
    model.save_pretrained(tmp_path / "saved")
    assert gap(type(model._orig_mod).from_pretrained(tmp_path / "saved"), logits(model)) < 1e-5


def with_adapter(model: Any) -> Any:
    model.add_adapter(LORA)
    return model


def with_compiled_block(model: Any) -> Any:
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    return model


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "PEFT": (lambda model: get_peft_model(model, LORA), r"carries a PEFT adapter \(PeftModel\).*model\.unload\(\)"),
    "adapter": (with_adapter, r"carries a PEFT adapter \(LlamaForCausalLM\).*delete_adapter"),
    "compiled block": (with_compiled_block, r"model\.layers\.0 is compiled on its own.*first; then compile"),
    "parallel": (nn.DataParallel, r"DataParallel wraps a LlamaForCausalLM: .*get_submodule\('module'\)"),
    "sequence": (nn.Sequential, r"Sequential wraps a LlamaForCausalLM: .*get_submodule\('0'\)"),
    "compiled PEFT": (lambda model: compiled(get_peft_model(model, LORA)), "carries a PEFT adapter"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_changes_names_or_inputs_is_refused_with_the_remedy(kind: str, source: Path, saved: Path) -> None:
    wrap, message = REFUSED[kind]
    model = wrap(quantized(source, BASE))
    with pytest.raises(UnsupportedModuleError, match=message):
        correct(model, source, **CHEAP)
    with pytest.raises(UnsupportedModuleError, match=message):
        glowq.load_correction(model, saved)


@pytest.mark.parametrize("given", ["org/model", None, {"model": 1}], ids=["name", "None", "dict"])
@pytest.mark.parametrize("door", ["correct", "load_correction", "find_groups", "detach", "set_enabled", "fast kernels"])
def test_what_is_not_a_model_is_refused(door: str, given: Any, tmp_path: Path) -> None:
    doors: dict[str, Callable[[], Any]] = {
        "correct": lambda: glowq.correct(given, reference="x", calibration="text"),
        "load_correction": lambda: glowq.load_correction(given, tmp_path),
        "find_groups": lambda: glowq.find_groups(given, {}),
        "detach": lambda: glowq.detach(given),
        "set_enabled": lambda: glowq.set_enabled(given, True),
        "fast kernels": lambda: glowq.use_fast_kernels(given),
    }
    with pytest.raises(UnsupportedModuleError, match=f"expected a model in memory, got {type(given).__name__}: load"):
        doors[door]()


def test_the_remedy_for_an_adapter_works(source: Path, saved: Path) -> None:
    model = get_peft_model(quantized(source, BASE), LORA)
    base = model.unload()
    glowq.load_correction(base, saved)
    again = get_peft_model(base, LORA)  # LoRA starts at zero
    plain = quantized(source, BASE)
    glowq.load_correction(plain, saved)
    assert gap(again, logits(plain)) < 1e-5
