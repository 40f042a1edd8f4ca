"""Import of LoRA adapters as corrections: the corrected model computes the same as PEFT; other adapters are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

import glowq
from glowq.errors import (
    ConfigError,
    CorrectionError,
    FingerprintError,
    GlowQError,
    ModelNotFoundError,
    NonFiniteError,
    PickleRefusedError,
    UnsupportedModuleError,
)
from glowq.integrations.export.registry import export
from glowq.integrations.peft.importer import import_adapter
from glowq.runtime.attach import attached
from support import writers
from support.cli import call, result_of
from support.tiny import IDS, corrected, gap, load, logits, quantized, tiny_llama

pytestmark = pytest.mark.usefixtures("uncompiled")

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BASE = "torchao-int4"  # its kernel computes in float32
LAYER = "model.layers.0.self_attn"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("source") / "llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def base(source: Path) -> Any:
    """The quantized model. Importing an adapter does not change it."""
    return quantized(source, BASE)


def trained(source: Path, folder: Path, **settings: Any) -> Tensor:
    """Save an adapter of PEFT with random weights, and return the logits of the model with it."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": ALL, "task_type": "CAUSAL_LM", **settings}
    adapted = get_peft_model(quantized(source, BASE), LoraConfig(**options))
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            weight.data.normal_(std=0.1)
    adapted.save_pretrained(folder)
    return logits(PeftModel.from_pretrained(quantized(source, BASE), folder).eval())


def attach(source: Path, correction: glowq.Correction, folder: Path) -> Any:
    correction.save_pretrained(folder)
    return load(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}, "alpha_pattern": {"v_proj": 3}},
        {"target_modules": ["q_proj", "down_proj"]},
        {"layers_to_transform": [1]},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.3},
    ],
    ids=str,
)
def test_the_corrected_model_says_what_peft_says(source: Path, base: Any, settings: Any, tmp_path: Path) -> None:
    expected = trained(source, tmp_path / "adapter", **settings)
    correction = import_adapter(tmp_path / "adapter", base)
    assert attached(base) == {}
    effect = gap(base, expected)
    assert gap(attach(source, correction, tmp_path / "correction"), expected) < 1e-4 * effect


def test_the_factors_are_the_scaled_product_in_float64(source: Path, base: Any, tmp_path: Path) -> None:
    trained(source, tmp_path, r=4, lora_alpha=6)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    correction = import_adapter(tmp_path, base)
    assert {entry.group.members for entry in correction.factors} == {
        (f"model.layers.{block}.{part}_proj",)
        for block in range(2)
        for part in (*(f"self_attn.{name}" for name in "qkvo"), "mlp.gate", "mlp.up", "mlp.down")
    }
    for entry in correction.factors:
        (member,) = entry.group.members
        a, b = (tensors[f"base_model.model.{member}.lora_{part}.weight"].double() for part in "AB")
        product = entry.lefts[member].double() @ entry.right.double()
        torch.testing.assert_close(product, b @ a * 6 / 4, atol=1e-8, rtol=1e-6)


def test_modules_of_one_input_and_one_right_factor_share_again(source: Path, base: Any, tmp_path: Path) -> None:
    trained(source, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in "kv":  # k shares with q; v gets the factor of o, which reads another input
        tensors[f"base_model.model.{LAYER}.{name}_proj.lora_A.weight"] = tensors[
            f"base_model.model.{LAYER}.{'q' if name == 'k' else 'o'}_proj.lora_A.weight"
        ].clone()
    save_file(tensors, file)
    ranks = import_adapter(tmp_path, base).ranks
    assert {name for name in ranks if name.startswith(LAYER)} == {
        f"{LAYER}.q_proj+k_proj",
        f"{LAYER}.v_proj",
        f"{LAYER}.o_proj",
    }


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a correction with ranks 5 and 2, without the first group."""
    _, correction = corrected(source, BASE, rank=5)
    correction.factors = [*correction.factors[1:4], *correction.cut(rank=2).factors[4:]]
    folder = tmp_path_factory.mktemp("made") / "correction"
    correction.cut(rank=5).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("options", [{}, {"pad_ranks": True}, {"fill_modules": True}], ids=str)
def test_export_and_import_give_the_same_factors(made: Path, base: Any, options: Any, tmp_path: Path) -> None:
    export(str(made), "peft", tmp_path / "adapter", **options)
    again = import_adapter(tmp_path / "adapter", base)
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "glowq.safetensors").read_bytes() == (made / "glowq.safetensors").read_bytes()
    before = glowq.Correction.from_pretrained(made)
    assert (again.ranks, again.config.base_model) == (before.ranks, before.config.base_model)
    with pytest.raises(ConfigError, match="holds no measured gains"):
        again.cut(budget="1%")


def test_an_adapter_of_other_quantized_weights_is_refused(made: Path, source: Path, tmp_path: Path) -> None:
    export(str(made), "peft", tmp_path / "adapter")
    with pytest.raises(FingerprintError, match="was exported for quantized weights"):
        import_adapter(tmp_path / "adapter", quantized(source, "torchao-int3"))


def test_what_gptqmodel_writes(base: Any, tmp_path: Path) -> None:
    """gptqmodel's config leaves out unset fields and uses lower-case names; its alpha has no effect at any rank."""
    peft = pytest.importorskip("gptqmodel.adapter.peft")
    peft.LoraConfig(
        r=4, lora_alpha=4, target_modules=["q_proj"], rank_pattern={r".*\.1\..*q_proj.*": 2}
    ).save_pretrained(str(tmp_path))
    draw = torch.Generator().manual_seed(0)
    names = {0: 4, 1: 2}
    tensors = {}
    for block, rank in names.items():
        key = f"base_model.model.model.layers.{block}.self_attn.q_proj"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, 128, generator=draw).half()
        tensors[f"{key}.lora_B.weight"] = torch.randn(128, rank, generator=draw).half()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    factors = {entry.group.name: entry for entry in import_adapter(tmp_path, base).factors}
    for block, rank in names.items():
        entry = factors[f"model.layers.{block}.self_attn.q_proj"]
        assert entry.rank == rank
        left = tensors[f"base_model.model.model.layers.{block}.self_attn.q_proj.lora_B.weight"]
        assert torch.equal(entry.lefts[entry.group.members[0]], left.float())


@pytest.mark.slow
def test_eora_of_gptqmodel(source: Path, tmp_path: Path) -> None:
    """gptqmodel quantizes a model and makes an EoRA adapter; glowq's model computes the same with the adapter.

    The test uses two steps. If gptqmodel 7.6 makes an adapter while it quantizes, two threads take two locks in
    opposite order (`GPTQProcessor.submodule_finalize` and `pack_module`), and usually block each other.
    """
    pytest.importorskip("gptqmodel")
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.adapter.adapter import Lora

    writers.gptqmodel(source, tmp_path / "gptq", bits=4, group_size=32)
    GPTQModel.adapter.generate(
        Lora(path=str(tmp_path / "eora"), rank=8), str(source), str(tmp_path / "gptq"), writers.TEXTS, device="cpu"
    )
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "gptq")
    result = result_of("import", tmp_path / "eora", "--base-model", tmp_path / "gptq", "--output", tmp_path / "out")
    assert set(result["ranks"].values()) == {8}
    loaded = load(tmp_path / "out")
    theirs = GPTQModel.load(
        str(tmp_path / "gptq"), adapter=Lora(rank=8, path=str(tmp_path / "eora")), backend=BACKEND.TORCH, device="cpu"
    )
    expected = logits(theirs.model).float()
    with glowq.disabled(loaded):
        effect = gap(loaded, expected)
    assert gap(loaded, expected) < 0.25 * effect


Change = Callable[[dict[str, Any], dict[str, Tensor]], Any]


def setting(name: str, value: Any) -> Change:
    return lambda settings, tensors: settings.update({name: value})


def tensor(name: str, value: Tensor) -> Change:
    return lambda settings, tensors: tensors.update({f"base_model.model.{name}": value})


@pytest.fixture(scope="module")
def adapter(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    trained(source, folder, target_modules=["q_proj"])
    return folder


Q = f"{LAYER}.q_proj"
REFUSED: dict[str, tuple[Change, type[GlowQError], str]] = {
    "DoRA": (setting("use_dora", True), ConfigError, "use_dora is True.*rescales the whole weight"),
    "biases": (setting("bias", "all"), ConfigError, "bias is 'all'.*changes biases"),
    "lora-bias": (setting("lora_bias", True), ConfigError, "lora_bias is True"),
    "transposed": (setting("fan_in_fan_out", True), ConfigError, "fan_in_fan_out is True.*transposed"),
    "modules": (setting("modules_to_save", ["lm_head"]), ConfigError, "modules_to_save is .*replaces whole modules"),
    "tokens": (setting("trainable_token_indices", [1]), ConfigError, "trainable_token_indices is .*embeddings"),
    "experts": (setting("target_parameters", ["x"]), ConfigError, "target_parameters is .*experts"),
    "unknown": (setting("use_qalora", True), ConfigError, "use_qalora is True.*does not support"),
    "pissa": (setting("init_lora_weights", "pissa_niter_4"), ConfigError, "'pissa_niter_4', which changes the base"),
    "another-kind": (setting("peft_type", "LOHA"), ConfigError, "is a LOHA adapter"),
    "another-rank": (setting("r", 3), CorrectionError, "has rank 4, and its adapter_config.json says 3"),
    "no-rank": (setting("r", None), CorrectionError, "must be a number above 0, found None"),
    "zero-alpha": (setting("lora_alpha", 0), CorrectionError, "lora_alpha of .* above 0, found 0"),
    "bad-pattern": (setting("rank_pattern", {"(": 4}), CorrectionError, "rank_pattern or r .* cannot be read"),
    "embedding": (
        tensor("lm_head.weight", torch.ones(2, 2)),
        ConfigError,
        "'base_model.model.lm_head.weight', which is",
    ),
    "magnitude": (tensor(f"{Q}.lora_magnitude_vector", torch.ones(2)), ConfigError, "magnitudes"),
    "half": (tensor("model.layers.1.mlp.up_proj.lora_A.weight", torch.ones(4, 128)), CorrectionError, "one of lora_A"),
    "shapes": (tensor(f"{Q}.lora_B.weight", torch.ones(128, 3)), CorrectionError, r"lora_B \(128, 3\)"),
    "integers": (tensor(f"{Q}.lora_B.weight", torch.ones(128, 4).int()), CorrectionError, "expected float tensors"),
    "width": (tensor(f"{Q}.lora_B.weight", torch.ones(64, 4)), CorrectionError, r"of shape \(64, 128\), and the model"),
    "nan": (tensor(f"{Q}.lora_B.weight", torch.full((128, 4), torch.nan)), NonFiniteError, "lora_B of .*q_proj is NaN"),
}


def changed(adapter: Path, folder: Path, change: Change) -> Path:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(settings, tensors)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_low_rank_correction_is_refused_by_name(adapter: Path, base: Any, name: str, tmp_path: Path) -> None:
    change, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        import_adapter(changed(adapter, tmp_path / "changed", change), base)
    assert attached(base) == {}


def pair(name: str, outputs: int = 4096) -> Change:
    def change(settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for part, shape in (("A", (4, 128)), ("B", (outputs, 4))):
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = torch.ones(shape)

    return change


def test_modules_that_cannot_be_corrected_are_refused(
    adapter: Path, base: Any, source: Path, made: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModuleError, match="lm_head, which glowq cannot correct: it is not quantized"):
        import_adapter(changed(adapter, tmp_path / "head", pair("lm_head")), base)
    with pytest.raises(CorrectionError, match=r"'model\.layers\.7\.mlp\.up_proj', and LlamaForCausalLM has no such"):
        import_adapter(changed(adapter, tmp_path / "seven", pair("model.layers.7.mlp.up_proj")), base)
    with pytest.raises(UnsupportedModuleError, match="holds no quantized linear module"):
        import_adapter(adapter, load(source))
    with pytest.raises(ConfigError, match="carries a correction already"):
        import_adapter(adapter, load(made))


def zeros(settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for name, value in tensors.items():
        if "lora_B" in name:
            value.zero_()


def test_files_that_are_no_adapter_are_refused(adapter: Path, base: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="adds nothing: every lora_B"):
        import_adapter(changed(adapter, tmp_path / "zeros", zeros), base)
    damaged = changed(adapter, tmp_path / "damaged", lambda settings, tensors: None)
    (damaged / "adapter_model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
    with pytest.raises(CorrectionError, match="is corrupt or truncated"):
        import_adapter(damaged, base)
    (damaged / "adapter_config.json").write_text("[]")
    with pytest.raises(CorrectionError, match="holds list, expected a JSON object"):
        import_adapter(damaged, base)
    (damaged / "adapter_model.safetensors").rename(damaged / "adapter_model.bin")
    with pytest.raises(PickleRefusedError, match=r"adapter_model\.bin, a pickle"):
        import_adapter(damaged, base)
    (damaged / "adapter_model.bin").unlink()
    (damaged / "adapter_config.json").unlink()
    with pytest.raises(ModelNotFoundError, match=r"holds no adapter_config\.json"):
        import_adapter(damaged, base)


def test_a_loftq_adapter_goes_onto_the_base_that_loftq_made(adapter: Path, base: Any, tmp_path: Path) -> None:
    change = setting("init_lora_weights", "loftq")
    assert (
        import_adapter(changed(adapter, tmp_path / "loftq", change), base).ranks == import_adapter(adapter, base).ranks
    )


def test_a_dense_base(source: Path, tmp_path: Path) -> None:
    model = load(source)
    adapted = get_peft_model(load(source), LoraConfig(target_modules=["up_proj"], init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    import_adapter(tmp_path / "adapter", model, dense=True).save_pretrained(tmp_path / "out")
    assert gap(load(tmp_path / "out"), logits(adapted)) < 1e-5


def test_the_command(source: Path, adapter: Path, tmp_path: Path) -> None:
    arguments = ["import", adapter, "--base-model", source, "--output", tmp_path / "out"]
    result = result_of(*arguments, "--base", BASE)
    assert result["ranks"] == {f"model.layers.{block}.self_attn.q_proj": 4 for block in range(2)}
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    with torch.no_grad():
        model = PeftModel.from_pretrained(quantized(source, BASE), adapter).eval()
        assert gap(load(tmp_path / "out"), model(input_ids=IDS).logits) < 1e-4
    assert "2 of 2 modules, rank 4" in call(*arguments, "--base", BASE).stdout
    inspected = result_of("inspect", tmp_path / "out")
    assert (inspected["method"], inspected["provenance"]["gains"]) == ("imported", "unmeasured")
    refused = call("select", tmp_path / "out", "--budget", "1%", "--output", tmp_path / "smaller")
    assert refused.exit_code == 1
    assert "holds no measured gains" in refused.stderr
    for extra, message in (([], "is not quantized: name the quantizer"), (["--base", "gptq-4"], "quantizes with text")):
        refused = call(*arguments, *extra)
        assert refused.exit_code == 1
        assert message in refused.stderr
    quantized(source, BASE).save_pretrained(tmp_path / "quantized")
    refused = call(
        "import", adapter, "--base-model", tmp_path / "quantized", "--base", BASE, "--output", tmp_path / "b"
    )
    assert refused.exit_code == 1
    assert "leave out --base" in refused.stderr
    refused = call("import", adapter, "--base-model", tmp_path / "out", "--output", tmp_path / "b")
    assert refused.exit_code == 1
    assert "carries a glowq correction already" in refused.stderr
