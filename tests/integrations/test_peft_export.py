"""A correction exported as a LoRA adapter, loaded with every loader of PEFT, transformers and GPTQModel."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

import glowq
from glowq.errors import ConfigError, ExportError, FingerprintError
from glowq.integrations.export.registry import export
from glowq.quantizers.model import prepare_model
from glowq.utils.manifest import MANIFEST
from glowq.utils.output import EXPORT_MANIFEST
from support import bases, writers
from support.cli import call, result_of
from support.fresh_process import run_python
from support.tiny import IDS, correct, corrected, gap, load, logits, quantized, tiny_llama

pytestmark = pytest.mark.usefixtures("uncompiled", "half_products")

WHOLE: dict[str, Any] = {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": False}


def varied(correction: glowq.Correction) -> glowq.Correction:
    """Return a correction with ranks from 1 to 6 and without the first and the last group.

    The same modules as in the first group are corrected in other blocks.
    """
    parts = []
    for index, entry in enumerate(correction.factors[1:-1]):
        whole = glowq.Correction([entry], correction.config, correction.model_config, correction.base_bytes)
        parts += whole.cut(rank=1 + index % 6).factors
    correction.factors = parts
    return correction.cut(rank=6)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("source") / "llama", num_hidden_layers=4)


@pytest.fixture(scope="module")
def saved(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both forms of a corrected NF4 model in bfloat16."""
    folder = tmp_path_factory.mktemp("saved")
    correction = varied(corrected(source, "nf4", rank=6)[1])
    correction.save_pretrained(folder / "correction")
    load(folder / "correction").save_pretrained(folder / "full")
    return folder


def rounded_apart(model: Any) -> Tensor:
    """Return the logits of a corrected model that rounds A (B x) before it adds it, as PEFT does.

    glowq rounds it separately if another hook may keep the layer's output. Otherwise it adds in place and rounds once.
    """
    handles = [module.register_forward_hook(lambda *_: None) for module in model.modules()]
    found = logits(model)
    for handle in handles:
        handle.remove()
    assert (logits(model) - found).abs().max() <= 2 * torch.finfo(found.dtype).eps * found.abs().max()
    return found


@pytest.fixture(scope="module")
def expected(saved: Path) -> Tensor:
    return rounded_apart(load(saved / "correction"))


@pytest.fixture(scope="module")
def exported(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    return folder, export(str(saved / "correction"), "peft", folder)


def load_as_in_readme(folder: Path) -> Any:
    """Run the code of the adapter's README.md and return its model, with PEFT's factors in the dtype of the files."""
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    exec(blocks[0], names)
    prepare_model(names["base"])
    exec(blocks[1].replace("this/repository", str(folder)), names)
    dtype = next(iter(load_file(folder / "adapter_model.safetensors").values())).dtype
    for module in names["model"].modules():
        if isinstance(module, LoraLayer):
            module.lora_A.to(dtype)
            module.lora_B.to(dtype)
    return names["model"].eval()


def test_what_the_readme_says_gives_the_corrected_models_bits(exported: Any, expected: Tensor) -> None:
    assert gap(load_as_in_readme(exported[0]), expected) == 0.0
    assert exported[1]["check"]["max_difference"] == 0.0


@pytest.mark.parametrize("loader", ["PeftModel", "load_adapter", "AutoModelForCausalLM"])
def test_every_loader_gives_the_corrected_model(loader: str, source: Path, exported: Any, expected: Tensor) -> None:
    folder, nf4 = exported[0], glowq.GlowQConfig(base="nf4").base
    if loader == "AutoModelForCausalLM":
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4)
    else:
        model = quantized(source, "nf4")
        if loader == "load_adapter":
            model.load_adapter(folder)
    prepare_model(model)
    if loader == "PeftModel":
        model = PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False)
    assert gap(model, expected) == 0.0
    model.disable_adapters() if loader != "PeftModel" else model.base_model.disable_adapter_layers()
    assert gap(model, logits(quantized(source, "nf4"))) < gap(model, expected)


def test_the_files_hold_the_factors_and_nothing_else(saved: Path, source: Path, exported: Any) -> None:
    folder, facts = exported
    correction = glowq.Correction.from_pretrained(saved / "correction")
    wanted = {}
    for entry in correction.factors:
        for member, left in entry.lefts.items():
            wanted[f"base_model.model.{member}.lora_A.weight"] = entry.right
            wanted[f"base_model.model.{member}.lora_B.weight"] = left
    found = load_file(folder / "adapter_model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert facts["adapter_bytes"] == sum(tensor.nbytes for tensor in found.values())
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == facts["base_model"] == str(source)
    assert facts["shared_bytes"] == correction.factor_bytes < facts["adapter_bytes"]
    assert (facts["least_rank"], facts["largest_rank"], facts["modules"]) == (1, 6, len(wanted) // 2)
    assert {path.name for path in folder.iterdir()} == {*facts["files"], EXPORT_MANIFEST, MANIFEST}


def test_both_forms_and_every_run_give_the_same_files(saved: Path, exported: Any, tmp_path: Path) -> None:
    for form in ("correction", "full"):
        export(str(saved / form), "peft", tmp_path / form)
        for file in exported[1]["files"]:
            assert (tmp_path / form / file).read_bytes() == (exported[0] / file).read_bytes()


def test_padded_ranks_need_no_pattern(saved: Path, source: Path, expected: Tensor, tmp_path: Path) -> None:
    export(str(saved / "correction"), "peft", tmp_path / "adapter", pad_ranks=True)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (6, 6)
    assert settings["rank_pattern"] == settings["alpha_pattern"] == {}
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {min(tensor.shape) for tensor in tensors.values()} == {6}
    model = load_as_in_readme(tmp_path / "adapter")
    assert gap(model, expected) < 0.05 * gap(quantized(source, "nf4"), expected)  # the order of sums differs


def test_filled_modules_are_all_that_are_quantized(saved: Path, expected: Tensor, tmp_path: Path) -> None:
    facts = export(str(saved / "correction"), "peft", tmp_path / "adapter", fill_modules=True)
    assert facts["modules"] == 4 * 7
    assert gap(load_as_in_readme(tmp_path / "adapter"), expected) == 0.0


def test_a_rank_above_the_engines_limit_says_what_to_type(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"group 'model\.layers.* has rank 6, above --max-rank 4.*glowq select"
    ) as error:
        export(str(saved / "correction"), "peft", tmp_path / "adapter", max_rank=4)
    assert not (tmp_path / "adapter").exists()
    advice = str(error.value)[str(error.value).index("select") :].replace("SMALLER", str(tmp_path / "smaller"))
    assert call(*shlex.split(advice)).exit_code == 0
    assert export(str(tmp_path / "smaller"), "peft", tmp_path / "adapter", max_rank=4)["largest_rank"] == 4
    with pytest.raises(ExportError, match=r"Correct again with --rank 4"):
        export(str(saved / "full"), "peft", tmp_path / "other", max_rank=4)


@pytest.mark.parametrize(
    "base", bases.rows("nf4-double", "int8", "torchao-int4", "quanto-int4", "hqq-4", "w4a16", "w4a16-asym")
)
def test_every_base(base: bases.Base, tmp_path: Path) -> None:
    source = bases.small_model() if base.is_preset else base.checkpoint(bases.small_model())
    dtype = torch.bfloat16
    model = quantized(source, base.name, dtype=dtype) if base.is_preset else load(source, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(bases.small_model())
    correct(model, bases.small_model(), tokenizer=tokenizer).save_pretrained(tmp_path / "correction")
    facts = export(str(tmp_path / "correction"), "peft", tmp_path / "adapter")
    assert facts["check"]["max_difference"] == 0.0
    assert gap(load_as_in_readme(tmp_path / "adapter"), rounded_apart(model)) == 0.0


def test_a_dense_base(tmp_path: Path) -> None:
    reference = tiny_llama(tmp_path / "reference", dtype=torch.float32)
    model = load(reference)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("proj.weight"):
                weight.copy_((weight * 64).round() / 64)
    model.save_pretrained(tmp_path / "rounded")
    rounded = load(tmp_path / "rounded")
    correct(rounded, reference, dense=True).save_pretrained(tmp_path / "correction")
    export(str(tmp_path / "correction"), "peft", tmp_path / "adapter")
    assert gap(load_as_in_readme(tmp_path / "adapter"), rounded_apart(rounded)) == 0.0


def test_an_encoder(tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    BertModel(BertConfig(vocab_size=4096, **shape)).save_pretrained(tmp_path / "bert")
    nf4, tokenizer = glowq.GlowQConfig(base="nf4").base, AutoTokenizer.from_pretrained(bases.MODEL)
    model = BertModel.from_pretrained(tmp_path / "bert", quantization_config=nf4)
    correct(model, tmp_path / "bert", tokenizer=tokenizer).save_pretrained(tmp_path / "correction")
    facts = export(str(tmp_path / "correction"), "peft", tmp_path / "adapter")
    assert facts["check"]["max_difference"] == 0.0
    found = load_as_in_readme(tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(found(IDS)[0], model(IDS)[0])


@pytest.fixture(scope="module")
def gptq(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a GPTQ checkpoint of gptqmodel and its correction, which leaves out two groups."""
    pytest.importorskip("gptqmodel")
    folder = tmp_path_factory.mktemp("gptq")
    writers.gptqmodel(source, folder / "base", bits=4, group_size=32, desc_act=False)
    model = load(folder / "base", dtype=torch.bfloat16)
    varied(correct(model, source, rank=6)).save_pretrained(folder / "correction")
    return folder


@pytest.mark.slow
def test_gptqmodels_own_loader(gptq: Path, tmp_path: Path) -> None:
    from gptqmodel import GPTQModel
    from gptqmodel.adapter.adapter import Lora
    from gptqmodel.utils.backend import BACKEND

    model = load(gptq / "correction")
    expected = logits(model).float()
    with glowq.disabled(model):
        effect = gap(model, expected)
    for name, options in {"some": {}, "all": {"fill_modules": True}}.items():
        export(str(gptq / "correction"), "peft", tmp_path / name, **options)
    settings: dict[str, Any] = {"backend": BACKEND.TORCH, "device": "cpu"}
    with pytest.raises(AssertionError, match="must both be present"):
        GPTQModel.load(str(gptq / "base"), adapter=Lora(rank=6, path=str(tmp_path / "some")), **settings)
    found = GPTQModel.load(str(gptq / "base"), adapter=Lora(rank=6, path=str(tmp_path / "all")), **settings)
    # The kernel of GPTQModel rounds differently from the kernel in transformers.
    assert gap(found.model, expected) < 0.25 * effect


@pytest.mark.slow
def test_a_base_that_only_the_full_form_holds(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("gptqmodel")
    config = glowq.GlowQConfig(base="gptq-4", rank=4, calibration=writers.TEXTS, calibration_tokens=1024)
    model = load(source, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "full")
    with pytest.raises(ExportError, match=r"was quantized in memory \(gptq\).*glowq\.detach\(model\)") as error:
        export(str(tmp_path / "full"), "peft", tmp_path / "adapter")
    lines = re.search(r"Save it: (.*?)\. Then", str(error.value))
    assert lines is not None
    code = f"import glowq; from transformers import LlamaForCausalLM; {lines[1]}"
    run_python("-c", code, cwd=tmp_path, check=True)
    export(str(tmp_path / "full"), "peft", tmp_path / "adapter", base_model=str(tmp_path / "base"))
    assert gap(load_as_in_readme(tmp_path / "adapter"), logits(load(tmp_path / "full"))) < 0.05


def test_another_base_is_refused(saved: Path, tmp_path: Path) -> None:
    other = tiny_llama(tmp_path / "other", seed=1, num_hidden_layers=4)
    with pytest.raises(FingerprintError, match="was made for quantized weights"):
        export(str(saved / "correction"), "peft", tmp_path / "adapter", base_model=str(other))
    assert not (tmp_path / "adapter").exists()


def test_a_model_without_correction_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="carries no glowq correction"):
        export(str(source), "peft", tmp_path / "adapter")


def test_an_option_of_another_exporter_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--dtype is no option of --to peft"):
        export(str(saved / "correction"), "peft", tmp_path / "adapter", dtype="float32")


def test_merging_into_the_quantized_base_loses_the_correction(source: Path, exported: Any, expected: Tensor) -> None:
    """Merging loses the correction, so the card advises against it. PEFT makes no call that glowq could refuse."""
    model = load_as_in_readme(exported[0])
    before = gap(quantized(source, "nf4"), expected)
    merged = model.merge_and_unload()
    prepare_model(merged)
    assert gap(merged, expected) > 0.5 * before


def test_a_corrected_model_into_which_an_adapter_was_merged_is_refused_once_saved(source: Path, tmp_path: Path) -> None:
    model, _ = corrected(source, "nf4")
    on_top = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **WHOLE))
    merged = on_top.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    with pytest.raises(FingerprintError, match="was made for quantized weights"):
        load(tmp_path / "merged")


def test_the_command(saved: Path, tmp_path: Path) -> None:
    arguments = ["export", saved / "correction", "--to", "peft", "--output"]
    result = result_of(*arguments, tmp_path / "adapter", "--pad-ranks", "--fill-modules")
    assert (result["least_rank"], result["modules"]) == (6, 28)
    refused = call(*arguments, tmp_path / "other", "--max-rank", "2")
    assert refused.exit_code == 1
    assert refused.stderr.startswith("glowq: error: group 'model.layers.")
    assert call(*arguments, tmp_path / "other", "--dtype", "float32").exit_code == 2
