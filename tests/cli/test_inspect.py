"""`glowq inspect` on every kind of model: its report from file headers equals the settings of the loaded modules."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from typer.testing import CliRunner

from glowq.cli.app import app
from glowq.quantizers.model import prepare_model
from support import writers
from support.bases import BASES, Base, rows, small_model
from support.tiny import corrected, load, quantized, seeded, tiny_llama

pytestmark = pytest.mark.usefixtures("uncompiled")

SAVED = [base.name for base in BASES if base.read is None and base.package != "optimum.quanto"]
TIED = "not quantized (it shares the embeddings' weight)"
KEYS = {"base", "schemes", "modules", "correctable", "skipped", "coverage", "note", "next"}


def call(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def inspected(model: Any) -> dict[str, Any]:
    done = call(model, "--json")
    assert done.exit_code == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def checkpoint(base: Base, folder: Path) -> Path:
    """Return a checkpoint that the library wrote or, for a preset, one that transformers saved."""
    if not base.is_preset:
        return base.checkpoint(small_model())
    model = base.load(dtype=torch.bfloat16)
    prepare_model(model)
    if hasattr(model.config.quantization_config, "dataset"):
        model.config.quantization_config.dataset = None  # token ids, which JSON cannot store
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("base", rows(*SAVED))
def test_the_headers_tell_what_the_loaded_modules_say(base: Base, tmp_path: Path) -> None:
    folder = checkpoint(base, tmp_path / "model")
    found = inspected(folder)
    model = load(folder)
    backends = prepare_model(model)
    schemes = {name: backend.scheme(model.get_submodule(name)) for name, backend in backends.items()}
    assert found["modules"] == {name: str(scheme) for name, scheme in schemes.items()}
    assert found["correctable"] == list(found["modules"])
    assert found["skipped"] == {"lm_head": TIED}
    assert found["note"] is None
    (only,) = set(schemes.values())
    assert found["schemes"] == [
        {
            "scheme": str(only),
            "format": only.format,
            "bits": base.bits,
            "group_size": only.group_size,
            "details": list(only.details),
            "modules": len(backends),
        }
    ]
    settings = found["base"].pop("settings")
    assert settings["quant_method"] == found["base"]["quant_method"]
    assert found["base"] == {
        "quant_method": settings["quant_method"],
        "backend": next(iter(backends.values())).name,
        "library": base.package,
        "extra": base.extra,
        "installed": True,
        "bits": base.bits,
        "group_size": only.group_size,
    }
    assert re.search(r"glowq correct \S+ --reference REF", found["next"])
    assert found.keys() >= KEYS


@pytest.mark.parametrize("base", rows("nf4"))
def test_no_weight_is_read_and_no_quantizer_is_needed(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(base, tmp_path / "model")
    real = importlib.util.find_spec

    def absent(name: str, *rest: Any) -> Any:
        return None if name == base.package else real(name, *rest)

    def loaded(*arguments: Any, **options: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(importlib.util, "find_spec", absent)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loaded)
    found = inspected(folder)
    assert len(found["correctable"]) == 14
    assert found["base"]["installed"] is False
    assert "pip install 'glowq[bitsandbytes]', then glowq correct" in found["next"]


@pytest.mark.parametrize("base", rows("w4a16"))
def test_settings_that_differ_by_module_are_counted(base: Base, tmp_path: Path) -> None:
    from glowq.quantizers.model import quantized_modules

    writers.compressed_tensors(small_model(), tmp_path, num_bits=4, strategy="group", group_size=64)
    config = json.loads((tmp_path / "config.json").read_text())
    first = config["quantization_config"]["config_groups"]["group_0"]
    wide = tmp_path / "wide"
    writers.compressed_tensors(small_model(), wide, num_bits=8, strategy="channel")
    tensors = load_file(tmp_path / "model.safetensors")
    other = {key: value for key, value in load_file(wide / "model.safetensors").items() if ".down_proj." in key}
    save_file({**tensors, **other}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    second = json.loads((wide / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    config["quantization_config"]["config_groups"] = {"a": first, "b": {**second, "targets": [r"re:.*down_proj$"]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found, model = inspected(tmp_path), load(tmp_path)
    expected = {name: str(b.scheme(model.get_submodule(name))) for name, b in quantized_modules(model).items()}
    assert found["modules"] == expected
    assert {entry["scheme"]: entry["modules"] for entry in found["schemes"]} == Counter(expected.values())
    assert len(found["schemes"]) == 2
    assert (found["base"]["bits"], found["base"]["group_size"]) == (None, None)


@pytest.mark.parametrize("base", rows("nf4"))
def test_modules_left_out_by_the_quantizer_are_named(base: Base, tmp_path: Path) -> None:
    config = base.config(small_model())
    config.llm_int8_skip_modules = ["down_proj", "lm_head"]
    model = load(small_model(), quantization_config=config)
    prepare_model(model)
    model.save_pretrained(tmp_path)
    found = inspected(tmp_path)
    assert len(found["correctable"]) == 12
    assert found["skipped"] == {
        "model.layers.0.mlp.down_proj": "not quantized",
        "model.layers.1.mlp.down_proj": "not quantized",
        "lm_head": TIED,
    }
    shown = call(tmp_path).stdout
    assert re.search(r"2 +│ model\.layers\.0\.mlp\.down_proj, \.\.\. +│ not quantized", shown)
    assert re.search(r"can be corrected +12", shown)


@pytest.mark.parametrize("base", rows("nf4"))
@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "mamba"])
def test_other_architectures(base: Base, kind: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    with seeded(0):
        if kind == "gpt2":
            full: Any = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=64, n_head=2, **sizes))
        elif kind == "mamba":
            full = MambaForCausalLM(MambaConfig(hidden_size=64, num_hidden_layers=2, **sizes))
        else:
            settings = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
            full = MixtralForCausalLM(
                MixtralConfig(**settings, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, **sizes)
            )
    full.save_pretrained(tmp_path / "full")
    model = load(tmp_path / "full", quantization_config=base.config(small_model()))
    names = set(prepare_model(model))
    model.save_pretrained(tmp_path / "nf4")
    found = inspected(tmp_path / "nf4")
    assert set(found["modules"]) == names
    if kind == "gpt2":
        assert found["skipped"] == {"lm_head": TIED}
        assert len(names) == 8
    elif kind == "mixtral":
        assert {name for name in found["skipped"] if "expert" in name} == {
            "model.layers.0.mlp.experts.gate_up_proj",
            "model.layers.0.mlp.experts.down_proj",
        }
        assert (
            "one parameter of shape (2, 64, 64) for all experts"
            in found["skipped"]["model.layers.0.mlp.experts.down_proj"]
        )
    else:
        assert any("dt_proj" in name for name in names)
        reasons = {reason for name, reason in found["skipped"].items() if name.endswith("dt_proj")}
        assert all("never called" in reason for reason in reasons)
        assert reasons


def test_a_plain_model_is_told_to_name_a_quantizer() -> None:
    found = inspected(small_model())
    assert (found["kind"], found["base"], found["correctable"]) == ("plain", None, [])
    assert set(Counter(found["skipped"].values()).items()) == {("not quantized", 14), (TIED, 1)}
    assert "not quantized: name a quantizer, for example glowq correct" in found["next"]
    assert "--base nf4" in found["next"]


@pytest.mark.parametrize("base", rows("hqq-saved-int4-axis-0"))
def test_hqqs_pickle_is_explained_and_not_read(base: Base, tmp_path: Path) -> None:
    shutil.copytree(base.checkpoint(small_model()), tmp_path / "hqq")
    (tmp_path / "hqq" / "qmodel.pt").write_bytes(b"no pickle at all")
    found = inspected(tmp_path / "hqq")
    assert (found["kind"], found["base"]["backend"], found["correctable"]) == ("quantized", "hqq", [])
    assert "a pickle, which can run code and which glowq does not read" in found["next"]
    assert "AutoHQQHFModel.from_quantized" in found["next"]


def test_gguf_names_the_command_that_corrects_it(tmp_path: Path) -> None:
    (tmp_path / "model-Q4_0.gguf").write_bytes(b"GGUF")
    for model in (tmp_path, tmp_path / "model-Q4_0.gguf"):
        found = inspected(model)
        assert (found["kind"], found["files"], found["correctable"]) == ("gguf", ["model-Q4_0.gguf"], [])
        assert f"glowq correct {tmp_path} --gguf-file model-Q4_0.gguf --base dense --reference REF" in found["next"]


def test_float8_is_corrected_once_it_was_dequantized(tmp_path: Path) -> None:
    writers.float8(small_model(), tmp_path)
    found = inspected(tmp_path)
    assert (found["base"]["quant_method"], found["base"]["backend"]) == ("fp8", None)
    assert found["correctable"] == []
    assert "--base dense --reference REF" in found["next"]
    assert found["skipped"]["model.layers.0.mlp.up_proj"] == found["next"]
    assert found["skipped"]["lm_head"] == TIED


def changed(folder: Path, tmp_path: Path, **settings: Any) -> Path:
    """Return a copy of a model with changed fields in its quantization config."""
    copy = Path(shutil.copytree(folder, tmp_path / "changed"))
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {**config.get("quantization_config", {}), **settings}
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def test_an_unknown_quantizer_is_named_with_those_that_are_known(tmp_path: Path) -> None:
    found = inspected(changed(small_model(), tmp_path, quant_method="aqlm"))
    assert found["correctable"] == []
    assert re.search(r"glowq reads no 'aqlm' weights \(it reads awq, bitsandbytes, .*torchao\)", found["next"])


@pytest.mark.parametrize("base", rows("w4a16"))
def test_a_format_that_cannot_be_read_is_named(base: Base, tmp_path: Path) -> None:
    folder = changed(base.checkpoint(small_model()), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["format"] = "marlin-24"
    (folder / "config.json").write_text(json.dumps(config))
    found = inspected(folder)
    assert found["correctable"] == []
    assert "format 'marlin-24' is none of pack-quantized" in found["skipped"]["model.layers.0.mlp.up_proj"]
    assert found["next"] == "no module of it can be corrected, for the reasons given."


@pytest.mark.parametrize("base", rows("awq-int4"))
def test_a_layout_that_cannot_be_read_is_named(base: Base, tmp_path: Path) -> None:
    folder = changed(base.checkpoint(small_model()), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    tensors[f"{name}.qweight"] = tensors[f"{name}.qweight"].T.contiguous()  # the layout of AWQ's GEMV kernels
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = inspected(folder)
    assert "AWQ's GEMM layout, the only one that glowq reads" in found["skipped"][name]
    assert len(found["correctable"]) == 13


@pytest.mark.parametrize("base", rows("nf4"))
def test_an_unknown_architecture_is_told_from_its_files(base: Base, tmp_path: Path) -> None:
    model = quantized(tiny_llama(tmp_path / "source"), base.name)
    prepare_model(model)
    model.save_pretrained(tmp_path / "nf4")
    config = json.loads((tmp_path / "nf4" / "config.json").read_text())
    (tmp_path / "nf4" / "config.json").write_text(json.dumps({**config, "model_type": "llama-of-tomorrow"}))
    found = inspected(tmp_path / "nf4")
    assert len(found["correctable"]) == 14
    assert "only the files were read" in found["note"]


@pytest.mark.parametrize("base", rows("nf4"))
def test_a_corrected_model_shows_both_its_base_and_its_groups(base: Base, tmp_path: Path) -> None:
    model, correction = corrected(tiny_llama(tmp_path / "source"), "nf4")
    model.save_pretrained(tmp_path / "full")
    correction.save_pretrained(tmp_path / "correction")
    full, small = inspected(tmp_path / "full"), inspected(tmp_path / "correction")
    assert (full["kind"], small["kind"]) == ("full", "correction")
    assert len(full["correctable"]) == 14
    assert full["groups"] == small["groups"]
    assert full["base"]["backend"] == "bitsandbytes-4bit"
    assert small["base"]["settings"] == full["base"]["settings"]
    assert "modules" not in small


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    load(small_model()).save_pretrained(tmp_path, max_shard_size="1MB")
    lost = sorted(tmp_path.glob("model-*.safetensors"))[1]
    lost.unlink()
    done = call(tmp_path)
    assert done.exit_code == 1
    assert f"{lost} is missing: the checkpoint in {tmp_path} is incomplete" in done.stderr
