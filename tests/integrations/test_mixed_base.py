"""`mixed`: a budget of bits and ranks. The base is what its own library makes of the stored config, and loads as it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

import glowq
from glowq.errors import ConfigError
from glowq.quantizers.model import packed_bytes, prepare_model, quantized_modules, read_weight
from glowq.quantizers.registry import base_config
from glowq.runtime.attach import attached_factors
from glowq.selection.mixing import Division
from support.bases import small_model
from support.cli import call, result_of
from support.shrunk import save_shrunk
from support.tiny import TEXTS, gap, library_texts, load, logits

SIZES: dict[str, Any] = {"calibration_tokens": 2048, "sequence_length": 64}
BUDGETS = {"torchao-int3": "20%", "hqq-3": "20%", "nf4": "60%"}
FORMS = {"hqq-3": ["--factor-dtype", "float"]}  # in 4 bits, ranks gain more than bits at this budget
SPECS = ["torchao-int3", "nf4", "hqq-3"]


def command(folder: Path, base: str, *more: Any, budget: str | None = None) -> list[Any]:
    library_texts(folder)
    sizes = ["--calibration", folder / "train.txt", "--calibration-tokens", 2048, "--sequence-length", 64]
    budget = BUDGETS[base] if budget is None else budget
    return [
        "correct",
        small_model(),
        "--base",
        base,
        "--mixed",
        "--budget",
        budget,
        *sizes,
        "--force",
        *FORMS.get(base, []),
        *more,
    ]


def plain(base: str) -> Any:
    model = load(small_model(), dtype="auto", quantization_config=base_config(base))
    prepare_model(model)
    return model


def widen_one_group(patch: pytest.MonkeyPatch, rank_bytes: int = 1) -> None:
    """Give one group more bits, whatever it gains: with nf4, full precision of a group never gains more than ranks."""
    name = "model.layers.0.self_attn.o_proj"

    def divide(ranks: Any, wider: Any, *_: Any, **__: Any) -> Division:
        return Division(frozenset({name}), wider[name].bytes, rank_bytes)

    patch.setattr("glowq.pipeline.mixed.divide", divide)


def members(widened: list[str]) -> set[str]:
    """Module names of groups, from their names."""
    found = set()
    for name in widened:
        parent, _, locals_ = name.rpartition(".")
        found |= {f"{parent}.{local}" for local in locals_.split("+")}
    return found


def wide_weight(base: str, name: str, weight: Tensor) -> Tensor:
    """What the library itself makes of one weight with the next larger width."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if base == "torchao-int3":
        from torchao.quantization import IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup

        quantize_(linear, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(64)))
        found: Any = linear.weight
        return found.dequantize()
    if base == "hqq-3":
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

        settings = BaseQuantizeConfig(nbits=4, group_size=64)
        return HQQLinear(linear, settings, compute_dtype=weight.dtype, device="cpu").dequantize()
    return weight


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The weight of every linear layer of the blocks, as the model multiplies by it, float32."""
    backends = quantized_modules(model)
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    names = [name for name, _ in model.named_modules() if name.endswith(kinds)]
    return {
        name: read_weight(backends[name], name, model.get_submodule(name))
        if name in backends
        else model.get_submodule(name).weight.detach().float()
        for name in names
    }


@pytest.fixture(scope="module", params=SPECS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict[str, Any]]:
    """The base, the folder of the correction, and the result of the command."""
    pytest.importorskip({"torchao-int3": "torchao", "nf4": "bitsandbytes", "hqq-3": "hqq"}[request.param])
    folder = tmp_path_factory.mktemp("mixed")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "nf4":
            widen_one_group(patch)
        return request.param, folder / "out", result_of(*command(folder, request.param, "--output", folder / "out"))


class TestCommand:
    def test_bits_and_ranks_fit_in_the_budget_together(self, made: tuple[str, Path, dict[str, Any]]) -> None:
        base, folder, result = made
        found, before = result["mixed"], packed_bytes(plain(base))
        assert found["of_base_bytes"] == before
        assert found["widened"]
        factors = load_file(folder / "glowq.safetensors")
        factor_bytes = sum(tensor.numel() * tensor.element_size() for tensor in factors.values())
        assert factor_bytes == result["factor_bytes"] > 0
        budget = int(float(BUDGETS[base][:-1]) / 100 * before)
        assert 0 < found["added_bytes"] + factor_bytes <= budget
        if base != "nf4":  # whose modules with more bits are no quantized ones
            assert result["base_bytes"] == before + found["added_bytes"]

    def test_the_base_is_what_its_library_makes(self, made: tuple[str, Path, dict[str, Any]]) -> None:
        base, folder, result = made
        model = load(folder)
        glowq.detach(model)
        wide = members(result["mixed"]["widened"])
        reference, narrow = weights(load(small_model(), dtype="auto")), weights(plain(base))
        for name, weight in weights(model).items():
            full = reference[name].to(torch.bfloat16)
            wanted = wide_weight(base, name, full).float() if name in wide else narrow[name]
            assert torch.equal(weight, wanted), name

    def test_it_loads_and_verifies(self, made: tuple[str, Path, dict[str, Any]]) -> None:
        _, folder, result = made
        first, second = load(folder), load(folder)
        assert gap(second, logits(first)) == 0.0
        assert result_of("verify", folder)["groups"] == result["groups"]
        stored = first.config.quantization_config.provenance.mixed
        assert stored == {key: value for key, value in result["mixed"].items() if key != "ranks_gain"}

    def test_it_loads_in_a_class_without_a_head(self, made: tuple[str, Path, dict[str, Any]]) -> None:
        _, folder, _ = made
        ids = torch.arange(1, 25)[None]
        with torch.no_grad():
            wanted = load(folder).model(input_ids=ids).last_hidden_state
            found = AutoModel.from_pretrained(folder)(input_ids=ids).last_hidden_state
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("base", ["torchao-int3", "nf4"])
def test_while_loading(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao" if base == "torchao-int3" else "bitsandbytes")
    if base == "nf4":
        widen_one_group(monkeypatch)
    library_texts(tmp_path)
    text = {"calibration": str(tmp_path / "train.txt"), **SIZES}
    asked = {"base": base, "mixed": True, "budget": BUDGETS[base], "force": True, **text}
    model = AutoModelForCausalLM.from_pretrained(small_model(), quantization_config=glowq.GlowQConfig(**asked))
    stored = model.config.quantization_config
    found = stored.provenance.mixed
    factor_bytes = sum(entry.factor_bytes for entry in attached_factors(model))
    before = packed_bytes(plain(base))
    assert found["of_base_bytes"] == before
    assert 0 < found["added_bytes"] + factor_bytes <= int(float(BUDGETS[base][:-1]) / 100 * before)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "full")
    again = load(tmp_path / "full", dtype="auto")
    assert gap(again, wanted) == 0.0
    assert again.config.quantization_config.provenance.mixed == found
    # The stored config alone makes the same base of the full-precision model.
    config = json.loads((tmp_path / "full" / "config.json").read_text())["quantization_config"]["base"]
    rebuilt = load(small_model(), dtype="auto", quantization_config=glowq.GlowQConfig(base=config).base)
    glowq.detach(again)
    for name, weight in weights(again).items():
        assert torch.equal(weight, weights(rebuilt)[name]), name


def test_without_a_group_that_fits_it_is_the_plain_correction(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    mixed = command(tmp_path, "torchao-int3", budget="1%")
    assert result_of(*mixed, "--output", tmp_path / "mixed")["mixed"] is None
    result_of(*(part for part in mixed if part != "--mixed"), "--output", tmp_path / "plain")
    first, second = (load_file(tmp_path / name / "glowq.safetensors") for name in ("mixed", "plain"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert (
        "mixed" not in json.loads((tmp_path / "mixed" / "config.json").read_text())["quantization_config"]["provenance"]
    )


def test_where_bits_win_everywhere_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    widen_one_group(monkeypatch, rank_bytes=0)
    done = call(*command(tmp_path, "torchao-int3", "--output", tmp_path / "out"))
    assert done.exit_code == 0
    assert "bits gain more than ranks everywhere" in " ".join(done.stdout.split())


def test_a_reference_whose_weights_cannot_all_stay_on_disk(tmp_path: Path) -> None:
    """Llama 4 moves its inputs to the device of a weight that accelerate has left on disk."""
    pytest.importorskip("torchao")
    save_shrunk("llama4_text", tmp_path)
    options = {"calibration": TEXTS, "calibration_tokens": 1024, "sequence_length": 32, "force": True}
    config = glowq.GlowQConfig(base="torchao-int3", mixed=True, budget="20%", **options)
    assert attached_factors(AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config))


class TestRefused:
    @pytest.mark.parametrize(
        ("base", "message"),
        [
            ("gptq-3", "cannot be used with a gptq base: transformers and optimum read one bit width for all modules"),
            (
                "torchao-int8",
                "cannot be used with a torchao base: torchao has no config with the next larger bit width",
            ),
            ("none", "name the quantizer of a full-precision model"),
            ("dense", "name the quantizer of a full-precision model"),
        ],
    )
    def test_a_base_that_cannot_be_mixed(self, base: str, message: str, tmp_path: Path) -> None:
        pytest.importorskip("torchao")
        pytest.importorskip("gptqmodel")
        done = call(*command(tmp_path, base, "--output", tmp_path / "never", budget="5%"))
        assert done.exit_code == 1
        assert done.stderr.count("\n") == 1
        assert message in done.stderr
        assert not (tmp_path / "never").exists()

    def test_a_base_that_cannot_be_mixed_while_loading(self) -> None:
        pytest.importorskip("gptqmodel")
        config = glowq.GlowQConfig(base="gptq-3", mixed=True, budget="5%", calibration=TEXTS)
        with pytest.raises(ConfigError, match="cannot be used with a gptq base"):
            AutoModelForCausalLM.from_pretrained(small_model(), quantization_config=config)

    def test_a_model_that_is_quantized_already(self) -> None:
        pytest.importorskip("torchao")
        with pytest.raises(ConfigError, match="this model is quantized already"):
            glowq.correct(plain("torchao-int3"), reference=small_model(), calibration=TEXTS, mixed=True, budget="5%")
