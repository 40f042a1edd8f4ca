"""vLLM refuses corrections that it cannot serve correctly, and gives the reason (`make test-vllm`)."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from glowq.errors import (
    ConfigError,
    CorrectionError,
    ModelNotFoundError,
    NonFiniteError,
    UnknownBaseError,
    UnsafePathError,
    UnsupportedModuleError,
    VersionError,
)

NO_KERNEL = ["gptq-8", "w8a16"]  # on a CPU

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.mark.parametrize("name", NO_KERNEL)
def test_a_base_without_a_kernel_here_is_refused_by_vllm_with_and_without_a_correction(
    name: str, checkpoints: Path, engine: Any
) -> None:
    refusals = []
    for form in ("base", "full"):
        folder = checkpoints / name / form
        with pytest.raises(ValueError, match=r"Failed to find a kernel|does not support") as caught, engine(folder):
            pass
        refusals.append(str(caught.value))
    assert refusals[0] == refusals[1]
    pytest.skip(f"vLLM has no kernel for {name} on this machine: {refusals[0].splitlines()[0]}")


@pytest.fixture
def damaged(tmp_path: Path, checkpoints: Path) -> Callable[[str, Callable[..., None]], Path]:
    """A function that copies a corrected compressed-tensors model and changes its tensors and its config.json."""

    def damage(form: str, change: Callable[..., None]) -> Path:
        folder = tmp_path / form
        shutil.copytree(checkpoints / "w4a16" / form, folder)
        file = folder / ("model.safetensors" if form == "full" else "glowq.safetensors")
        tensors, config = load_file(file), json.loads((folder / "config.json").read_text())
        change(tensors, config["quantization_config"])
        save_file(tensors, file, metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return damage


LEFT, RIGHT = "model.layers.0.self_attn.q_proj.left", "model.layers.0.self_attn.q_proj+k_proj+v_proj.right"


def lose(tensors: Any, config: Any) -> None:
    del tensors[LEFT]


def add(tensors: Any, config: Any) -> None:
    tensors["model.layers.0.mlp.other.left"] = tensors[LEFT].clone()


def shorten(tensors: Any, config: Any) -> None:
    tensors[RIGHT] = tensors[RIGHT][:, :-1].contiguous()


def spoil(tensors: Any, config: Any) -> None:
    tensors[RIGHT][0, 0] = torch.inf


def lengthen(tensors: Any, config: Any) -> None:
    tensors[LEFT] = torch.cat([tensors[LEFT], tensors[LEFT]])
    group = config["groups"][RIGHT.removesuffix(".right")]
    group["out_features"][0] *= 2


def widen(tensors: Any, config: Any) -> None:
    tensors[RIGHT] = torch.cat([tensors[RIGHT], tensors[RIGHT]], 1)
    group = config["groups"][RIGHT.removesuffix(".right")]
    group["in_features"] *= 2


def correct_the_head(tensors: Any, config: Any) -> None:
    shape = {"members": ["lm_head"], "in_features": 256, "out_features": [4096], "rank": 1}
    config["groups"]["lm_head"] = {**shape, "block": "lm_head", "gains": [1.0], "total": 1.0}
    tensors |= {"lm_head.right": torch.ones(1, 256), "lm_head.left": torch.ones(4096, 1)}


def forget_the_base(tensors: Any, config: Any) -> None:
    config["base_model"]["name"] += "-gone"


def name_an_unquantized_base(tensors: Any, config: Any) -> None:
    config["base_model"]["name"] = str(Path(config["base_model"]["name"]).parents[1] / "llama" / "base")


@pytest.mark.parametrize(
    ("form", "change", "error", "message"),
    [
        ("full", lose, CorrectionError, f"factor '{LEFT}' is missing"),
        ("correction", lose, CorrectionError, f"factor '{LEFT}' is missing"),
        ("full", add, CorrectionError, "extra factor 'model.layers.0.mlp.other.left'"),
        ("full", shorten, CorrectionError, "has shape (3, 255)"),
        ("full", spoil, NonFiniteError, f"factor '{RIGHT}'"),
        ("full", lengthen, UnsupportedModuleError, "q_proj has 512 outputs in the correction, but 256 in vLLM's QKV"),
        ("full", widen, UnsupportedModuleError, "reads 512 features, but its layer in vLLM reads 256"),
        ("full", correct_the_head, UnsupportedModuleError, "has no linear layer 'lm_head'"),
        (
            "correction",
            name_an_unquantized_base,
            ValueError,
            "is not quantized: transformers quantizes it while loading",
        ),
        ("correction", forget_the_base, ModelNotFoundError, "base-gone' is neither a folder nor a Hub repository"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_damaged_correction_is_refused(
    damaged: Any, form: str, change: Any, error: Any, message: str, checkpoints: Path, engine: Any
) -> None:
    folder = damaged(form, change)
    with pytest.raises(error, match=re.escape(message)), engine(folder):
        pass


@pytest.mark.parametrize("load_format", ["safetensors", "dummy"])
def test_another_load_format_is_refused(load_format: str, checkpoints: Path, engine: Any) -> None:
    folder, message = checkpoints / "llama" / "full", f"--load-format {load_format}, which reads no factors"
    with pytest.raises(ConfigError, match=message), engine(folder, load_format=load_format):
        pass


def test_what_vllm_cannot_run_is_refused_by_name(checkpoints: Path) -> None:
    from glowq.integrations.vllm.config import GlowQQuantizationConfig

    path = checkpoints / "gptq" / "correction" / "config.json"
    stored = json.loads(path.read_text())["quantization_config"]
    for changes, message in (
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"cannot run this correction's base \(bitsandbytes\)"),
        ({"quant_method": "quanto", "weights": "int4"}, r"cannot run this correction's base \(quanto\)"),
        ({**stored["base"], "bits": 3}, r"cannot run this correction's base \(gptq\): .*bits=3"),
    ):
        with pytest.raises(UnknownBaseError, match=message):
            GlowQQuantizationConfig.from_config({**stored, "base": changes})
    with pytest.raises(ConfigError, match=r"no config\.json says how this correction's base is quantized"):
        GlowQQuantizationConfig.from_config({**stored, "base": None})
    with pytest.raises(ConfigError, match="names no group"):
        GlowQQuantizationConfig.from_config({"quant_method": "glowq", "base": stored["base"]})
    with pytest.raises(VersionError, match="format version 99"):
        GlowQQuantizationConfig.from_config({**stored, "version": 99})
    with pytest.raises(UnsafePathError, match="names the local folder"):
        GlowQQuantizationConfig.from_config(stored).maybe_update_config("me/correction")


def test_vllm_finds_the_plugin_and_glowq_does_not_load_vllm() -> None:
    found = [point.value for point in entry_points(group="vllm.general_plugins") if point.name == "glowq"]
    assert found == ["glowq.integrations.vllm:register"]
    program = "import sys, glowq, glowq.integrations.vllm; print([name for name in sys.modules if name == 'vllm'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
