"""Errors of the ONNX export: unsupported packings, operators, models, missing packages. It leaves no files behind."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from glowq.errors import ConfigError, ExportError, ModelNotFoundError, UntestedVersionWarning
from glowq.integrations.export.registry import export
from glowq.integrations.onnx import exporter
from glowq.integrations.onnx.graph import describe, export_graph
from support.tiny import corrected, quantized, tiny_llama


def test_an_unsupported_packing_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "llama")
    corrected(folder, "torchao-int3")[1].save_pretrained(tmp_path / "correction")
    with pytest.raises(ExportError, match=r"q_proj \(int3, .*3 bits a code.*--to merged"):
        export(str(tmp_path / "correction"), "onnx", tmp_path / "export")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["correction", "llama"]


def test_an_operator_without_an_onnx_form_is_named_with_its_module(tmp_path: Path, tokenizer: Any) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=64, num_hidden_layers=1, num_local_experts=4, **sizes)).eval()
    with pytest.raises(ExportError) as refused:
        export_graph(model, describe(model, tokenizer), tmp_path)
    assert "model.layers.0.mlp.experts at transformers.grouped_mm" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_models_of_other_kinds_are_refused(tokenizer: Any) -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 1}
    heads = {"intermediate_size": 32, "num_attention_heads": 4}
    models = {
        "T5ForConditionalGeneration is an encoder with a decoder": T5ForConditionalGeneration(
            T5Config(vocab_size=64, d_model=32, d_ff=32, d_kv=8, num_layers=1, num_heads=4)
        ),
        "ViTModel reads no input_ids": ViTModel(ViTConfig(**small, **heads, image_size=32)),
        "MambaForCausalLM returned no cache of keys and values": MambaForCausalLM(MambaConfig(vocab_size=64, **small)),
    }
    for reason, model in models.items():
        with pytest.raises(ExportError, match=reason):
            describe(model.eval(), tokenizer)


def test_what_is_no_correction_is_refused(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "llama")
    with pytest.raises(ExportError, match="carries no glowq correction"):
        export(str(folder), "onnx", tmp_path / "export")
    quantized(folder, "torchao-int8").save_pretrained(tmp_path / "plain")
    with pytest.raises(ExportError, match="carries no glowq correction"):
        export(str(tmp_path / "plain"), "onnx", tmp_path / "export")


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_said_first(package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"needs {package}, which is not installed: pip install 'glowq\[onnx\]'"):
        exporter.write("nowhere", tmp_path)


def test_untested_versions_are_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(exporter, "_TESTED", {"onnxruntime": "<1"})
    with pytest.warns(UntestedVersionWarning, match="onnxruntime 1"), pytest.raises(ModelNotFoundError):
        exporter.write(str(tmp_path / "nowhere"), tmp_path)
