"""The full-precision reference model is read one weight at a time, and unsuitable models are refused by name."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
)

from glowq.errors import (
    ModelNotFoundError,
    NonFiniteError,
    PickleRefusedError,
    ReferenceMismatchError,
    UnsupportedModuleError,
)
from glowq.models.forward import to_model
from glowq.models.reference import Reference
from glowq.models.reference_checks import check_loaded, check_revision
from support.bases import Base, rows
from support.shrunk import auto_class, inputs_of, save_shrunk

Factory = Callable[..., Any]
NAME = "model.layers.0.self_attn.k_proj"


def tensors_on_meta(model: nn.Module) -> bool:
    return all(parameter.is_meta for parameter in model.parameters())


def test_a_folder_is_read_one_weight_at_a_time(bundled: Path) -> None:
    with safe_open(bundled / "model.safetensors", "pt") as file, Reference(bundled, LlamaForCausalLM) as reference:
        assert tensors_on_meta(reference.model)
        for name, shape in {NAME: (128, 256), "model.layers.7.mlp.down_proj": (256, 768)}.items():
            weight = reference.weight(name, shape)
            assert weight.dtype == torch.float32
            assert torch.equal(weight, file.get_tensor(f"{name}.weight").float())
            assert tensors_on_meta(reference.model)
        tied = reference.weight("lm_head", (4096, 256))
        assert torch.equal(tied, file.get_tensor("model.embed_tokens.weight").float())


def test_a_sharded_folder_reads_the_same(tiny_llama: Factory, tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    with Reference(str(tmp_path), LlamaForCausalLM) as reference:
        assert torch.equal(reference.weight(NAME, (16, 32)), model.get_submodule(NAME).weight)


def test_the_reference_can_be_run_and_then_put_away(tiny_llama: Factory, tiny_ids: Any, tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    reference = Reference(tmp_path, LlamaForCausalLM)
    with pytest.raises(RuntimeError, match="inside its `with` block"):
        _ = reference.model
    with reference, torch.no_grad():
        torch.testing.assert_close(reference.model(tiny_ids).logits, model(tiny_ids).logits)
    with pytest.raises(RuntimeError, match="inside its `with` block"):
        _ = reference.model


@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        ("neomme", ["unembedding_projection.weight"]),  # hidden_states @ self.unembedding_projection.weight
        # torch.cat([self.decoder.weight.t(), self.dense.weight], dim=0), from which a meta tensor is computed
        ("mobilebert", [f"cls.predictions.{name}" for name in ("dense.weight", "decoder.weight", "decoder.bias")]),
        ("llama4_text", None),  # input_ids.to(self.embed_tokens.weight.device): any weight; all stay in memory
    ],
)
def test_weights_that_other_layers_read_stay_in_memory(
    kind: str, kept: list[str] | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """torch multiplies by a meta tensor without an error; what comes out is memory that nothing was written to."""
    save_shrunk(kind, tmp_path)
    model = auto_class(kind).from_pretrained(tmp_path).eval()
    inputs = inputs_of(model)
    with Reference(tmp_path, type(model)) as reference, torch.no_grad():
        with caplog.at_level(logging.WARNING, logger="glowq"):
            reference.check_runs(inputs)
        torch.testing.assert_close(reference.model(**inputs).logits, model(**inputs).logits)
        named = list(reference.model.named_parameters(remove_duplicate=False))
        found = [name for name, weight in named if not weight.is_meta]
    assert found == (kept or [name for name, _ in named])
    (line,) = [record.getMessage() for record in caplog.records]
    size = sum(weight.nbytes for name, weight in named if name in found)
    assert line == (
        f"{type(model).__name__} uses weights of layers that it does not call: {size / 1e6:,.1f} MB of the reference "
        "stay in memory."
    )


def test_weights_that_are_computed_and_not_stored(tmp_path: Path) -> None:
    """Marian's positions are sines: its checkpoints hold none, and transformers does not count them as missing."""
    small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    tokens = {"vocab_size": 32, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 16}
    model = MarianMTModel(MarianConfig(**small, **tokens, **heads)).eval()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "embed_positions" in name]  # noqa: SIM118
    inputs = {"input_ids": torch.arange(2, 10)[None], "decoder_input_ids": torch.arange(5)[None]}
    with Reference(tmp_path, MarianMTModel, fresh=model) as reference, torch.no_grad():
        assert reference.missing == []
        torch.testing.assert_close(reference.model(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("given", ["name", "model"])
def test_it_calls_the_modules_that_the_quantized_model_calls(given: str, tiny_ids: Any, tmp_path: Path) -> None:
    """FalconMamba reads the weight of dt_proj, but calls the module where its config is marked as quantized."""
    small = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "time_step_rank": 4, "vocab_size": 64}
    quantized, full = (FalconMambaForCausalLM(FalconMambaConfig(**small)).eval() for _ in range(2))
    quantized.config._is_quantized = True  # as transformers does
    full.save_pretrained(tmp_path)
    calls = []
    source = tmp_path if given == "name" else full
    with Reference(source, FalconMambaForCausalLM, fresh=quantized) as reference, torch.no_grad():
        reference.check_runs({"input_ids": tiny_ids})
        projection = reference.model.get_submodule("backbone.layers.0.mixer.dt_proj")
        projection.register_forward_pre_hook(lambda module, args: calls.append(args))
        torch.testing.assert_close(reference.model(tiny_ids).logits, full(tiny_ids).logits)
        assert calls
    assert not hasattr(full.config, "_is_quantized")


def test_it_computes_on_the_device_of_the_quantized_model(tiny_llama: Factory, tiny_ids: Any, tmp_path: Path) -> None:
    """The meta device takes the place of a GPU: every layer's weights and inputs are moved to it."""
    model, meta = tiny_llama(), torch.device("meta")
    model.save_pretrained(tmp_path)
    devices = {}
    with Reference(tmp_path, LlamaForCausalLM, device=meta) as reference, torch.no_grad():
        inputs = to_model({"input_ids": tiny_ids}, reference.model)
        assert inputs["input_ids"].device == meta
        for name, module in reference.model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(
                    lambda module, args, output, name=name: devices.update({name: (args[0].device, output.device)})
                )
        assert reference.model(**inputs).logits.device == meta
        assert torch.equal(reference.weight(NAME, (16, 32)), model.get_submodule(NAME).weight)
        check_revision(model, reference.model)
    assert set(devices) == {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(devices.values()) == {(meta, meta)}


def test_a_model_in_memory_is_taken_as_it_is_and_never_written(tiny_llama: Factory) -> None:
    model = tiny_llama()
    with Reference(model, LlamaForCausalLM) as reference:
        assert reference.model is model
        weight = reference.weight(NAME, (16, 32))
        assert torch.equal(weight, model.get_submodule(NAME).weight)
        assert not weight.requires_grad
        weight.zero_()
        assert model.get_submodule(NAME).weight.any()
        half = reference.weight("lm_head", (64, 32))
    assert half.dtype == torch.float32


def test_conv1d_weights_are_turned_round() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=16))
    weight = Reference(model, GPT2LMHeadModel).weight("transformer.h.0.attn.c_attn", (96, 32))
    assert torch.equal(weight, model.transformer.h[0].attn.c_attn.weight.T)


def test_another_models_modules_are_refused(tiny_llama: Factory) -> None:
    reference = Reference(tiny_llama(), LlamaForCausalLM)
    with pytest.raises(ReferenceMismatchError, match=r"no module 'model\.layers\.9\.mlp\.up_proj'.* another model"):
        reference.weight("model.layers.9.mlp.up_proj", (48, 32))
    with pytest.raises(ReferenceMismatchError, match=r"k_proj has shape \(16, 32\) in the reference and \(32, 32\)"):
        reference.weight(NAME, (32, 32))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_damaged_weight_is_refused_by_name(tiny_llama: Factory, value: float) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.get_submodule(NAME).weight[3, 5] = value
    with pytest.raises(NonFiniteError, match=r"model\.layers\.0\.self_attn\.k_proj of the reference holds NaN or Inf"):
        Reference(model, LlamaForCausalLM).weight(NAME, (16, 32))


def test_a_module_without_a_weight_is_refused(tiny_llama: Factory) -> None:
    with pytest.raises(UnsupportedModuleError, match="LlamaAttention without a plain float weight"):
        Reference(tiny_llama(), LlamaForCausalLM).weight("model.layers.0.self_attn", (16, 32))


@pytest.mark.parametrize("base", rows("nf4", "int8", "torchao-int8", "torchao-int4"))
def test_a_quantized_model_is_no_reference(base: Base, tmp_path: Path) -> None:
    model = base.load()
    with pytest.raises(UnsupportedModuleError, match="must be the full-precision model, not a quantized one"):
        Reference(model, LlamaForCausalLM).weight(NAME, (128, 256))
    model.save_pretrained(tmp_path)
    with (
        pytest.raises(UnsupportedModuleError, match="is quantized; the reference must be the full-precision model"),
        Reference(tmp_path, LlamaForCausalLM),
    ):
        pytest.fail("opened")


def test_folders_that_hold_no_model_are_refused(tiny_llama: Factory, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError), Reference(tmp_path / "nowhere", LlamaForCausalLM):
        pytest.fail("opened")
    tiny_llama().config.save_pretrained(tmp_path)
    with pytest.raises(ModelNotFoundError, match="is missing"), Reference(tmp_path, LlamaForCausalLM):
        pytest.fail("opened")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(PickleRefusedError), Reference(tmp_path, LlamaForCausalLM):
        pytest.fail("opened")


def test_scaled_columns_of_a_layer_in_float_are_accepted() -> None:
    """AWQ scales a router's columns, too, where it divides the norm before by their scales."""
    reference, model = (nn.ModuleDict({"router": nn.Linear(32, 8)}) for _ in range(2))
    with torch.no_grad():
        scaled = reference["router"].weight * torch.linspace(0.5, 2, 32)
        model["router"].weight.copy_(scaled)
    check_loaded(model, reference)
    with torch.no_grad():
        model["router"].weight.normal_()
    with pytest.raises(ReferenceMismatchError, match=r"^router, which is not quantized, "):
        check_loaded(model, reference)
