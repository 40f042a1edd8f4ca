"""Experts whose matrices are stacked in one parameter, and those that a library has quantized one by one."""

from __future__ import annotations

import copy
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    FineGrainedFP8Config,
    Mxfp4Config,
    TorchAoConfig,
)

import glowq
from glowq.errors import CorrectionError, ExportError, ReferenceMismatchError
from glowq.integrations.export.registry import export
from glowq.models.candidates import find_candidates
from glowq.models.headers import read_headers
from glowq.models.tracing import find_groups
from glowq.quantizers.loading.dense import mark_dense
from glowq.quantizers.loading.divided_experts import divide_experts
from support import tiny, writers
from support.fresh_process import run_python
from support.tiny import EXAMPLE, TEXTS, VOCABULARY, seeded

Auto = AutoModelForCausalLM
TOKENIZER = AutoTokenizer.from_pretrained(EXAMPLE)
IDS = TOKENIZER(TEXTS[0] + TEXTS[1][:200], return_tensors="pt").input_ids[:, -256:].reshape(4, 64)  # as calibrated on
SIZES: dict[str, Any] = {
    **VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "num_experts": 4,
    "num_local_experts": 4,
}
INT8 = Int8WeightOnlyConfig()
KINDS = ["mixtral", "gpt_oss"]  # GPT-OSS: transposed, with biases, gate and up in turns
OPTIONS: dict[str, Any] = {"rank": 4, "calibration": TEXTS, "calibration_tokens": 1024, "sequence_length": 64}


def logits(model: nn.Module) -> Tensor:
    return tiny.logits(model, IDS)


def saved(folder: Path, kind: str, **sizes: Any) -> Path:
    with seeded(0), torch.no_grad():
        model = Auto.from_config(AutoConfig.for_model(kind, **{**SIZES, **sizes}), dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
            elif "norm" not in name:
                parameter.normal_(std=0.02)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(EXAMPLE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("source") / request.param, request.param)


@pytest.fixture(scope="module")
def rounded(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with the experts' matrices rounded, and all else in full precision, as mxfp4 leaves GPT-OSS."""
    model, folder = Auto.from_pretrained(source), tmp_path_factory.mktemp("rounded") / source.name
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 3:
                assert "experts" in name
                parameter.copy_((parameter * 10).round() / 10)
    model.save_pretrained(folder)
    return folder


def quantized(source: Path) -> Any:
    """torchao's 8 bits for the experts, too."""
    matching = {r"re:.*experts\.(gate_up|down)_proj": INT8, "_default": INT8}
    options = {"quantization_config": TorchAoConfig(FqnToConfig(matching)), "experts_implementation": "eager"}
    return Auto.from_pretrained(source, dtype=torch.float32, **options)


def corrected(model: Any, source: Path, **options: Any) -> glowq.Correction:
    tokenizer = AutoTokenizer.from_pretrained(source)
    return glowq.correct(model, reference=str(source), tokenizer=tokenizer, **{**OPTIONS, **options})


def merged_in_float64(dense: Any, correction: glowq.Correction) -> Any:
    """Add every A B to the weights of a float model, which transformers itself then runs, in float64."""
    model = copy.deepcopy(dense).double()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        for entry in correction.factors:
            for member, left in entry.lefts.items():
                product = left.double() @ entry.right.double()
                found = re.fullmatch(r"(.*experts)\.(\d+)\.(\w+)", member)
                if found is None:
                    model.get_submodule(member).weight.add_(product)
                else:
                    stack = getattr(model.get_submodule(found[1]), found[3])
                    matrix = stack[int(found[2])]
                    matrix.add_(product if matrix.shape == product.shape else product.T)
    return model


def expert_names(correction: glowq.Correction) -> set[str]:
    return {name for name in correction.ranks if ".experts." in name}


EXPERTS = {
    f"model.layers.{layer}.mlp.experts.{expert}.{part}"
    for layer in range(2)
    for expert in range(4)
    for part in ("gate_up_proj", "down_proj")
}


class TestDense:
    def test_rounded_experts_are_corrected_exactly(self, source: Path, rounded: Path, tmp_path: Path) -> None:
        model = Auto.from_pretrained(rounded)
        before, full = logits(model), logits(Auto.from_pretrained(source))
        correction = corrected(model, source, dense=True)
        assert expert_names(correction) == EXPERTS
        found = logits(model)
        expected = logits(merged_in_float64(Auto.from_pretrained(rounded), correction))
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        assert (found - full).norm() < (before - full).norm()
        coverage = correction.config.provenance.coverage
        assert coverage is not None
        assert set(coverage["modules"]) > EXPERTS
        biases = [value for name, value in model.named_parameters() if "experts" in name and name.endswith("_bias")]
        floats = [size for name, size in coverage["not_quantized"].items() if "Experts" in name]
        assert sum(floats) == sum(bias.nbytes for bias in biases)
        correction.save_pretrained(tmp_path / "correction")
        model.save_pretrained(tmp_path / "full")
        for form in ("correction", "full"):
            assert torch.equal(logits(Auto.from_pretrained(tmp_path / form)), found)
        glowq.detach(model)
        assert torch.equal(logits(model), before)

    @pytest.mark.parametrize("how", ["copied", "pickled", "loaded", "another implementation"])
    def test_the_correction_stays_with_the_model(self, how: str, source: Path, rounded: Path, tmp_path: Path) -> None:
        model = Auto.from_pretrained(rounded)
        correction = corrected(model, source, dense=True, method="qera")
        expected = logits(model)
        if how == "copied":
            model = copy.deepcopy(model)
        elif how == "pickled":
            model = pickle.loads(pickle.dumps(model))
        elif how == "loaded":
            correction.save_pretrained(tmp_path)
            model = Auto.from_pretrained(rounded)
            glowq.load_correction(model, tmp_path)
        else:
            model.set_experts_implementation("batched_mm")
        assert torch.equal(logits(model), expected)
        with glowq.disabled(model):
            plain = logits(Auto.from_pretrained(rounded, experts_implementation="eager"))
            torch.testing.assert_close(logits(model), plain, rtol=1e-5, atol=1e-5)
        glowq.detach(model)
        implementation = "batched_mm" if how == "another implementation" else None
        fresh = Auto.from_pretrained(rounded, experts_implementation=implementation)
        assert torch.equal(logits(model), logits(fresh))

    def test_another_model_with_a_copy_of_its_config_runs(self, source: Path, rounded: Path) -> None:
        """The config says that glowq runs the experts; it called itself without end."""
        model = Auto.from_pretrained(rounded)
        corrected(model, source, dense=True, method="qera")
        model(IDS)
        other = Auto.from_config(copy.deepcopy(model.config), dtype=torch.float32)
        other.load_state_dict(Auto.from_pretrained(rounded).state_dict())
        expected = logits(Auto.from_pretrained(rounded, experts_implementation="eager"))
        assert torch.equal(logits(other), expected)
        mark_dense(other)
        assert torch.equal(logits(other), expected)

    def test_it_exports_as_a_dense_model_and_is_refused_where_experts_are_no_modules(
        self, source: Path, rounded: Path, tmp_path: Path
    ) -> None:
        model = Auto.from_pretrained(rounded)
        correction = corrected(model, source, dense=True, method="qera")
        expected = logits(merged_in_float64(Auto.from_pretrained(rounded), correction))
        model.save_pretrained(tmp_path / "full")
        AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "full")
        export(str(tmp_path / "full"), "merged", tmp_path / "merged", dtype="float32")
        found = logits(Auto.from_pretrained(tmp_path / "merged"))
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
        for target in ("peft", "onnx"):
            with pytest.raises(ExportError, match=r"experts\.\d+\.\w+ is corrected, and is a part of a parameter"):
                export(str(tmp_path / "full"), target, tmp_path / target)
            assert not (tmp_path / target).exists()


@pytest.mark.parametrize("kind", ["mxfp4", "fp8"])
def test_experts_that_transformers_dequantizes_are_corrected(kind: str, tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "gpt_oss" if kind == "mxfp4" else "qwen3_moe")
    (writers.mxfp4 if kind == "mxfp4" else writers.fp8)(source, tmp_path / kind)
    asked = Mxfp4Config(dequantize=True) if kind == "mxfp4" else FineGrainedFP8Config(dequantize=True)

    def load() -> Any:
        return Auto.from_pretrained(tmp_path / kind, dtype=torch.float32, quantization_config=asked)

    model, full = load(), logits(Auto.from_pretrained(source))
    before = logits(model)
    correction = corrected(model, source, dense=True)
    assert expert_names(correction) == EXPERTS
    found = logits(model)
    assert (found - full).norm() < (before - full).norm() < 0.5 * full.norm()
    correction.save_pretrained(tmp_path / "correction")
    model.save_pretrained(tmp_path / "full")
    assert torch.equal(logits(Auto.from_pretrained(tmp_path / "full")), found)
    again = load()
    glowq.load_correction(again, tmp_path / "correction")
    assert torch.equal(logits(again), found)


def test_torchaos_experts_are_found_in_memory_and_in_the_files(tmp_path: Path) -> None:
    source = saved(tmp_path / "mixtral", "mixtral")
    model = quantized(source)
    before = logits(model)
    groups = {group.name for group in find_groups(model, {"input_ids": torch.arange(64)[None]})}
    assert groups > EXPERTS
    assert torch.equal(logits(model), before)
    model.save_pretrained(tmp_path / "int8")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "int8")
    headers = read_headers(str(tmp_path / "int8"))
    found = find_candidates(str(tmp_path / "int8"), headers, headers.config["quantization_config"], None)
    assert set(found.correctable) > EXPERTS
    assert {str(found.schemes[name]) for name in EXPERTS} == {"int8, one scale a row, symmetric"}
    assert found.note is None
    stored = sum(size for name, size in headers.sizes.items() if "experts" in name or "self_attn" in name)
    assert found.sizes["correctable"] == stored


def test_torchaos_experts_are_corrected_and_load_again(tmp_path: Path) -> None:
    source = saved(tmp_path / "mixtral", "mixtral")
    model = quantized(source)
    before, full = logits(model), logits(Auto.from_pretrained(source))
    dense = copy.deepcopy(model)
    correction = corrected(model, source)
    assert expert_names(correction) == EXPERTS
    found = logits(model)
    expected = logits(merged_in_float64(dequantized(dense, source), correction))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert (found - full).norm() < (before - full).norm()
    correction.save_pretrained(tmp_path / "correction")
    model.save_pretrained(tmp_path / "full")
    for form in ("correction", "full"):
        loaded = Auto.from_pretrained(tmp_path / form)
        assert torch.equal(logits(loaded), found)
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "full")
    export(str(tmp_path / "full"), "merged", tmp_path / "merged", dtype="float32")
    merged = logits(Auto.from_pretrained(tmp_path / "merged"))
    torch.testing.assert_close(merged.double(), expected, rtol=1e-4, atol=1e-4)


def dequantized(model: Any, source: Path) -> Any:
    """A float model with the weights that torchao itself dequantizes."""
    plain = Auto.from_pretrained(source)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if hasattr(parameter, "dequantize") and type(parameter.data) is not Tensor:
                plain.get_parameter(name).copy_(parameter.dequantize())
    return plain


_WRITE = """
import sys
from pathlib import Path
from support import writers
source, folder = map(Path, sys.argv[1:])
if source.name == "mixtral":
    import torch
    from gptqmodel import BACKEND, GPTQModel
    from support.tiny import logits
    writers.gptqmodel(source, folder, bits=4, group_size=64)
    model = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.bfloat16)
    torch.save(logits(model.model), folder / "logits")
elif source.name == "mixtral-awq":
    writers.awq(source, folder)
else:
    writers.compressed_tensors(source, folder, num_bits=4, group_size=32, strategy="group", symmetric=True)
"""


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Full-precision models, and checkpoints of them in which libraries have quantized each expert.

    They are written in other processes, because gptqmodel replaces classes of transformers.
    """
    folder = tmp_path_factory.mktemp("one-by-one")
    sources = {"gptq": saved(folder / "mixtral", "mixtral"), "w4a16": saved(folder / "qwen3_moe", "qwen3_moe")}
    sources["awq"] = saved(folder / "mixtral-awq", "mixtral", num_key_value_heads=4)  # AWQ takes rows by the 64
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    for name, source in sources.items():
        run_python("-c", _WRITE, source, folder / name, env=env, check=True)
    sources["gptq-w123"] = sources["gptq"]
    _with_mixtrals_own_names(folder / "gptq", folder / "gptq-w123")
    return {**sources, "folder": folder}


def _with_mixtrals_own_names(source: Path, target: Path) -> None:
    """Copy a checkpoint, with the names of the experts that Mixtral had before transformers 5."""
    shutil.copytree(source, target)
    names = {".mlp.": ".block_sparse_moe.", ".gate_proj.": ".w1.", ".up_proj.": ".w3.", ".down_proj.": ".w2."}
    renamed = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        for new, old in names.items():
            name = name.replace(new, old)
        renamed[name] = tensor
    save_file(renamed, target / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["gptq", "gptq-w123", "awq", "w4a16"])
def test_experts_that_were_quantized_one_by_one_are_loaded_and_corrected(
    kind: str, one_by_one: dict[str, Path], tmp_path: Path
) -> None:
    source, checkpoint = one_by_one[kind], one_by_one["folder"] / kind
    model = Auto.from_pretrained(checkpoint, dtype=torch.float32)
    before, full = logits(model), logits(Auto.from_pretrained(source))
    assert (before - full).norm() < 0.5 * full.norm()  # transformers alone leaves the experts random
    model = Auto.from_pretrained(checkpoint, dtype=torch.float32)
    correction = corrected(model, source)
    first, last = ("w1+w3", "w2") if kind == "gptq-w123" else ("gate_proj+up_proj", "down_proj")
    expected = {name.replace("gate_up_proj", first).replace("down_proj", last) for name in EXPERTS}
    assert expert_names(correction) == expected
    headers = read_headers(str(checkpoint))
    stored = find_candidates(str(checkpoint), headers, headers.config["quantization_config"], None)
    assert set(stored.correctable) == {member for entry in correction.factors for member in entry.group.members}
    assert not any("experts" in name for name in stored.skipped)
    found = logits(model)
    assert (found - full).norm() < (before - full).norm()
    correction.save_pretrained(tmp_path / "correction")
    assert torch.equal(logits(Auto.from_pretrained(tmp_path / "correction", dtype=torch.float32)), found)
    if kind == "gptq-w123":
        with pytest.raises(CorrectionError, match="save its correction instead"):
            model.save_pretrained(tmp_path / "full")
        return
    model.save_pretrained(tmp_path / "full")
    assert torch.equal(logits(Auto.from_pretrained(tmp_path / "full", dtype=torch.float32)), found)


def test_gptqmodels_experts_are_those_that_gptqmodel_loads(one_by_one: dict[str, Path]) -> None:
    checkpoint = one_by_one["folder"] / "gptq"
    theirs = torch.load(checkpoint / "logits")
    found = tiny.logits(Auto.from_pretrained(checkpoint, dtype=torch.bfloat16))
    assert (found.float() - theirs.float()).norm() < 0.02 * theirs.float().norm()


def test_files_without_quantized_experts_leave_a_model_as_it_is(tmp_path: Path) -> None:
    source = saved(tmp_path / "mixtral", "mixtral")
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle is not looked into")
    with torch.device("meta"):
        model = Auto.from_config(AutoConfig.from_pretrained(source))
    names = [name for name, _ in model.named_modules()]
    divide_experts(model, [str(source / "model.safetensors"), str(tmp_path / "pytorch_model.bin")])
    assert [name for name, _ in model.named_modules()] == names


def test_experts_that_were_not_loaded_are_refused(tmp_path: Path) -> None:
    source = saved(tmp_path / "mixtral", "mixtral")
    model = Auto.from_pretrained(source, quantization_config=glowq.GlowQConfig(base="torchao-int4").base)
    with torch.no_grad(), seeded(1):
        model.model.layers[1].mlp.experts.down_proj.normal_(std=0.1)
    with pytest.raises(ReferenceMismatchError, match=r"layers\.1\.mlp\.experts\.down_proj, which is not quantized"):
        corrected(model, source)
