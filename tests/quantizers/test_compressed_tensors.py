"""More tests of compressed-tensors: modules before and after decompression, other formats, and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

import glowq
from glowq.artifact.fingerprint import fingerprint
from glowq.errors import BackendError, FingerprintError, RepackedWeightError
from glowq.quantizers.base import Scheme
from glowq.quantizers.model import prepare_model, quantized_modules, read_weight
from glowq.quantizers.registry import find_backend
from support import writers
from support.bases import rows, small_model
from support.tiny import CALIBRATION, TEXTS, gap, load, logits

pytest.importorskip("compressed_tensors")

NAME = "model.layers.1.mlp.down_proj"
INT8_INPUTS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
FLOAT8_INPUTS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
KINDS: dict[str, dict[str, Any]] = {
    "w3a16-asym": {"num_bits": 3, "strategy": "group", "group_size": 64, "symmetric": False},
    "w4a16": {"num_bits": 4, "strategy": "group", "group_size": 128},
    "w4a16-asym": {"num_bits": 4, "strategy": "group", "group_size": 64, "symmetric": False},
    "w4a16-act-order": {"num_bits": 4, "strategy": "group", "group_size": 128, "actorder": "weight"},
    "w8a16-channels-asym": {"num_bits": 8, "strategy": "channel", "symmetric": False},
    "w8a16-asym": {"num_bits": 8, "strategy": "group", "group_size": 64, "symmetric": False},
    "w8a8": {"num_bits": 8, "strategy": "channel", "input_activations": INT8_INPUTS},
    "float8": {"num_bits": 8, "type": "float", "strategy": "channel", "input_activations": FLOAT8_INPUTS},
    "float8-tensor": {"num_bits": 8, "type": "float", "strategy": "tensor", "input_activations": FLOAT8_INPUTS},
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that returns the folder of a kind of checkpoint and writes it at the first call."""
    written: dict[str, Path] = {}

    def folder(kind: str, **more: Any) -> Path:
        key = f"{kind} {more}"
        if key not in written:
            written[key] = tmp_path_factory.mktemp(kind)
            writers.compressed_tensors(small_model(), written[key], **{**KINDS[kind], **more})
        return written[key]

    return folder


def run(model: Any) -> Tensor:
    return logits(model, torch.arange(8)[None])


def correct(model: Any, **options: Any) -> glowq.Correction:
    tokenizer = AutoTokenizer.from_pretrained(small_model())
    return glowq.correct(
        model, reference=small_model(), calibration=TEXTS, tokenizer=tokenizer, rank=4, **CALIBRATION, **options
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_module_reads_the_same_before_and_after_the_library_made_it_dense(
    checkpoint: Any, kind: str, dtype: torch.dtype
) -> None:
    model = load(checkpoint(kind), dtype=dtype)
    names = prepare_model(model)
    before = {name: read_weight(backend, name, model.get_submodule(name)) for name, backend in names.items()}
    codes = {name: backend.codes(model.get_submodule(name)) for name, backend in names.items()}
    sealed = fingerprint(model)
    run(model)
    assert fingerprint(model) == sealed
    assert quantized_modules(model).keys() == names.keys()
    for name, backend in names.items():
        module = model.get_submodule(name)
        assert torch.equal(read_weight(backend, name, module), before[name])
        assert torch.equal(before[name], module.weight.float()), "what the library itself made of the packed tensors"
        assert all(torch.equal(now, then) for now, then in zip(backend.codes(module), codes[name], strict=True))


@pytest.mark.parametrize("kind", ["w4a16", "w8a8", "float8"])
def test_a_model_that_ran_before_glowq_saw_it_is_read_right(checkpoint: Any, kind: str) -> None:
    model, fresh = load(checkpoint(kind)), load(checkpoint(kind))
    run(model)
    assert fingerprint(model) == fingerprint(fresh)
    modules = [side.get_submodule(NAME) for side in (model, fresh)]
    assert torch.equal(*(read_weight(find_backend(module), NAME, module) for module in modules))


def test_codes_that_the_dense_weight_does_not_tell_are_refused(checkpoint: Any) -> None:
    model = load(checkpoint("w8a16-asym"))
    run(model)
    with pytest.raises(RepackedWeightError, match=r"asymmetric 8-bit .* before its first forward"):
        fingerprint(model)


def test_a_dense_weight_that_was_changed_is_refused(checkpoint: Any) -> None:
    model = load(checkpoint("w4a16"))
    run(model)
    model.get_submodule(NAME).weight.data[0, 0] += 0.01
    with pytest.raises(RepackedWeightError, match="it was changed since"):
        fingerprint(model)


@pytest.mark.parametrize("kind", ["w4a16-asym", "w8a16-asym", "w8a8", "float8"])
def test_saved_after_its_first_forward_the_model_is_packed_still(checkpoint: Any, kind: str, tmp_path: Path) -> None:
    model = load(checkpoint(kind))
    run(model)
    if kind == "w8a16-asym":
        model = load(checkpoint(kind))
    correction = correct(model)
    expected = logits(model)
    correction.save_pretrained(tmp_path / "correction")
    model.save_pretrained(tmp_path / "full")
    glowq.detach(model)
    plain = logits(model)
    model.save_pretrained(tmp_path / "plain")
    sizes = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "plain")}
    original = (checkpoint(kind) / "model.safetensors").stat().st_size
    assert original * 0.99 < sizes["plain"] < original * 1.01 < sizes["full"] < original * 1.2
    for form in ("correction", "full"):
        assert gap(load(tmp_path / form), expected) == 0.0
    assert gap(load(tmp_path / "plain"), plain) == 0.0


def test_activations_that_are_rounded_stay_so_and_the_weight_error_is_corrected(checkpoint: Any) -> None:
    model = load(checkpoint("w8a8"), dtype=torch.float32)
    module = model.get_submodule(NAME)
    assert find_backend(module).scheme(module) == Scheme("int8", 8, None, ("symmetric", "inputs rounded to int8"))
    correct(model)
    x = torch.randn(3, 768, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), glowq.disabled(model):
        assert float((module(x) - x @ module.weight.T).abs().max()) > 1e-4
    # The noise of rounded inputs differs between processors, by 3% of the total on a few tokens.
    ids = torch.randint(0, 4096, (32, 64), generator=torch.Generator().manual_seed(1))
    reference = logits(load(small_model(), dtype=torch.float32), ids)
    with glowq.disabled(model):
        before = float((logits(model, ids) - reference).norm())
    assert float((logits(model, ids) - reference).norm()) < 1.02 * before


def test_an_asymmetric_packed_checkpoint_loads_with_transformers(checkpoint: Any) -> None:
    from compressed_tensors.compressors import decompress_module
    from transformers import CompressedTensorsConfig

    packed = load(checkpoint("w4a16-asym"))
    dense = load(checkpoint("w4a16-asym"), quantization_config=CompressedTensorsConfig(dequantize=True))
    module = packed.get_submodule(NAME)
    assert module.weight_zero_point.dtype == torch.int32
    decompress_module(module)
    assert torch.equal(module.weight, dense.get_submodule(NAME).weight)


def test_modules_that_were_left_alone_are_not_corrected(checkpoint: Any) -> None:
    model = load(checkpoint("w4a16", ignore=("re:.*down_proj",)))
    correction = correct(model)
    members = {member for entry in correction.factors for member in entry.group.members}
    assert len(members) == 12
    assert not any("lm_head" in member or "down_proj" in member for member in members)


@pytest.mark.parametrize("base", rows("nf4", "torchao-int4"))
def test_the_head_is_not_corrected(base: Any) -> None:
    correction = correct(base.load())
    assert not any("lm_head" in member for entry in correction.factors for member in entry.group.members)


def test_a_checkpoint_that_was_saved_dense_is_refused(checkpoint: Any, tmp_path: Path) -> None:
    model = load(checkpoint("w4a16"))
    run(model)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    with pytest.raises(BackendError, match=r"saved after the model's first forward.*dequantize=True.*dense=True"):
        correct(loaded)


def test_a_correction_of_other_codes_is_refused(checkpoint: Any, tmp_path: Path) -> None:
    correct(load(checkpoint("w4a16"))).save_pretrained(tmp_path / "correction")
    with pytest.raises(FingerprintError):
        glowq.load_correction(load(checkpoint("w4a16-asym")), tmp_path / "correction")


def test_an_unknown_format_is_refused_by_name(checkpoint: Any) -> None:
    model = load(checkpoint("w4a16"))
    module = model.get_submodule(NAME)
    module.quantization_scheme = module.quantization_scheme.model_copy(update={"format": "nvfp4-pack-quantized"})
    with pytest.raises(BackendError, match=r"'nvfp4-pack-quantized' is none of .*dequantize=True.*dense=True"):
        read_weight(find_backend(module), NAME, module)


def test_a_weight_that_is_only_going_to_be_quantized_is_refused() -> None:
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    model = load(small_model())
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=4))
    apply_quantization_config(model, QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"]))
    module = model.get_submodule(NAME)
    with pytest.raises(BackendError, match=r"not quantized yet .*'initialized'.*save_compressed=True"):
        read_weight(find_backend(module), NAME, module)


def test_the_layers_of_transformers_own_float8_kernel_are_refused_by_name() -> None:
    from transformers.integrations.compressed_tensors import CompressedTensorsFP8Linear

    module = CompressedTensorsFP8Linear(32, 16)
    backend = find_backend(module)
    backend.prepare(module, torch.bfloat16)
    for read in (backend.weight, backend.codes, backend.scales, backend.scheme, backend.packed_bytes):
        with pytest.raises(BackendError, match="without use_optimized_inference"):
            read(module)
