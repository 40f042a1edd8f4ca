"""Checkpoints of autoawq 0.2.9: reading, dividing out channel scales, correcting and saving (`make test-autoawq`)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

import glowq
from glowq.data.text import read_texts
from glowq.data.tokens import token_sequences
from glowq.errors import FoldingError
from glowq.evaluation.scores import score_models
from glowq.models.reference import Reference
from glowq.models.reference_checks import check_revision
from glowq.models.tracing import trace_groups
from glowq.models.weight_errors import WeightErrors
from glowq.quantizers.base import Scheme
from glowq.quantizers.model import prepare_model, quantized_modules, read_weight
from glowq.quantizers.registry import method_of
from support.bases import small_model
from support.tiny import CALIBRATION, IDS, gap, load, logits

FOLDER = os.environ.get("GLOWQ_AUTOAWQ_CHECKPOINTS")
CHECKPOINT = Path(FOLDER or "") / "as-on-gpu"
DAMAGED = Path(FOLDER or "") / "damaged-by-cpu"
GROUP = 64
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj")

pytestmark = [
    pytest.mark.autoawq,
    pytest.mark.skipif(FOLDER is None, reason="needs the checkpoints that `make test-autoawq` writes"),
]


def unpack(words: Tensor) -> np.ndarray:
    """Unpack the 4-bit numbers from AWQ's int32 words, shape (n, m) -> (n, 8 m).

    Each word holds eight adjacent columns in the order 0, 2, 4, 6, 1, 3, 5, 7, from the lowest bits upwards.
    """
    unsigned = words.numpy().view(np.uint32)
    columns = np.empty((unsigned.shape[0], unsigned.shape[1] * 8), dtype=np.int64)
    for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        columns[:, column::8] = unsigned >> np.uint32(4 * place) & np.uint32(15)
    return columns


def stored_weight(tensors: dict[str, Tensor], name: str, dtype: torch.dtype) -> np.ndarray:
    """Return (code - zero point) * scale from the tensors of the file, shape (o, d), float32.

    The scales are first rounded to `dtype`.
    """
    codes, zeros = unpack(tensors[f"{name}.qweight"]), unpack(tensors[f"{name}.qzeros"])
    scales = tensors[f"{name}.scales"].to(dtype).float().numpy()
    inputs = np.arange(codes.shape[0]) // GROUP
    return ((codes - zeros[inputs]).astype(np.float32) * scales[inputs]).T


def relative(error: Tensor, weight: Tensor) -> float:
    return float(error.norm() / weight.norm())


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return load_file(CHECKPOINT / "model.safetensors")


@pytest.fixture(scope="module")
def held_out() -> Tensor:
    """Token ids of held-out text, shape (16, 128)."""
    tokenizer = AutoTokenizer.from_pretrained(small_model())
    return token_sequences(read_texts("python-stdlib:held-out"), tokenizer, length=128, limit=2048, seed=1)


def correct(model: Any) -> glowq.Correction:
    tokenizer = AutoTokenizer.from_pretrained(small_model())
    settings: dict[str, Any] = {**CALIBRATION, "calibration_tokens": 4096, "rank": 8}
    return glowq.correct(model, reference=small_model(), calibration="python-stdlib", tokenizer=tokenizer, **settings)


def lost(model: Any, ids: Tensor) -> float:
    """Return the mean KL divergence from the full-precision model, in nats per token."""
    reference = load(small_model(), dtype=model.dtype)
    return float(score_models({"reference": reference, "model": model}, ids)["model"].kl.mean())


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def made(request: pytest.FixtureRequest) -> tuple[torch.dtype, Any, glowq.Correction]:
    """The dtype, the corrected model and its correction."""
    model = load(CHECKPOINT, dtype=request.param)
    return request.param, model, correct(model)


def test_the_checkpoint_is_of_autoawq(tensors: dict[str, Tensor]) -> None:
    config = json.loads((CHECKPOINT / "config.json").read_text())["quantization_config"]
    assert config == {  # gptqmodel would also write its name and a checkpoint format
        "bits": 4,
        "group_size": GROUP,
        "modules_to_not_convert": None,
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    }
    assert len([name for name in tensors if name.endswith("_proj.qweight")]) == 14


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_are_read_as_they_lie_in_the_file(tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    model = load(CHECKPOINT, dtype=dtype)
    backends = prepare_model(model)
    assert {f"{name}.qweight" for name in backends} == {name for name in tensors if name.endswith(".qweight")}
    half = torch.float16 if dtype == torch.float32 else dtype  # dtype of the scales in the kernel
    for name, backend in backends.items():
        module = model.get_submodule(name)
        assert type(module).__module__.startswith("gptqmodel.")
        assert backend.scheme(module) == Scheme("awq int4", 4, GROUP)
        read = read_weight(backend, name, module)
        assert read.dtype == torch.float32
        assert np.array_equal(read.numpy(), stored_weight(tensors, name, half))
        with torch.no_grad():
            given = module(torch.eye(module.in_features, dtype=dtype)).T.float()
        assert relative(given - read, read) < 5e-3  # the kernel rounds


def test_unfolding_finds_what_autoawq_folded(tensors: dict[str, Tensor]) -> None:
    original = load_file(small_model() / "model.safetensors")
    model = load(CHECKPOINT, dtype=torch.float32)
    backends = prepare_model(model)
    groups = trace_groups(model, {"input_ids": IDS}).groups
    with Reference(small_model(), LlamaForCausalLM) as reference:
        check_revision(model, reference.model)
        found = WeightErrors(model, reference, backends)
        errors = found.errors(groups)
    for group in groups:
        parts = errors[group.name].split(list(group.out_features))
        for name, error in zip(group.members, parts, strict=True):
            stored = torch.from_numpy(stored_weight(tensors, name, torch.float16))
            full = original[f"{name}.weight"].float()
            before, after = relative(full - stored, full), relative(error, error + stored)
            if name.endswith("o_proj"):  # with grouped heads, autoawq folds no scales into o_proj
                assert name not in found.scales
                assert torch.equal(error, full - stored)
            else:
                assert after < 0.9 * before
            assert after < 0.13  # rounding to nearest gives 0.10
    for block in ("model.layers.0", "model.layers.1"):
        for norm, readers in (("input_layernorm", ATTENTION), ("post_attention_layernorm", MLP)):
            key = f"{block}.{norm}.weight"
            scale = original[key].double() / tensors[key].double()
            for name in readers:
                columns = found.scales[f"{block}.{name}"].columns
                assert columns is not None
                torch.testing.assert_close(columns, scale, rtol=1e-5, atol=0)


def test_the_correction_brings_the_model_nearer_to_the_reference(made: Any, held_out: Tensor) -> None:
    _, model, _ = made
    after = lost(model, held_out)
    with glowq.disabled(model):
        before = lost(model, held_out)
    assert after < 0.9 * before


def test_saved_by_reference_and_loaded_again_is_the_same_model(made: Any, tmp_path: Path) -> None:
    dtype, model, correction = made
    expected = logits(model)
    correction.save_pretrained(tmp_path)
    assert gap(load(tmp_path), expected) == 0.0
    again = load(CHECKPOINT, dtype=dtype)
    glowq.load_correction(again, tmp_path)
    assert gap(again, expected) == 0.0


def test_saved_in_one_piece_it_holds_the_tensors_of_autoawq(
    made: Any, tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    _, model, _ = made
    expected = logits(model)
    model.save_pretrained(tmp_path / "full")
    loaded = load(tmp_path / "full")
    assert gap(loaded, expected) == 0.0
    assert method_of(loaded.config.quantization_config) == "glowq"
    loaded.save_pretrained(tmp_path / "again")
    assert gap(load(tmp_path / "again"), expected) == 0.0
    for folder in ("full", "again"):
        saved = load_file(tmp_path / folder / "model.safetensors")
        for name in quantized_modules(model):
            for key in (f"{name}.qweight", f"{name}.qzeros", f"{name}.scales"):
                assert saved[key].dtype == tensors[key].dtype
                assert saved[key].numpy().tobytes() == tensors[key].numpy().tobytes()


def test_what_its_search_on_a_cpu_scaled_and_never_divided_is_refused(held_out: Tensor) -> None:
    model = load(DAMAGED, dtype=torch.float32)
    prepare_model(model)
    assert lost(model, held_out) > 3 * lost(load(CHECKPOINT, dtype=torch.float32), held_out)
    with pytest.raises(
        FoldingError, match=r"0\.self_attn\.q_proj\+k_proj\+v_proj: its columns are scaled by 0\.\d\d to 1"
    ):
        correct(model)
