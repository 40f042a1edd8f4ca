"""Channel scales that AWQ and SmoothQuant fold into a model: glowq finds them in the weights and divides them out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import glowq
from glowq.data.text import read_texts
from glowq.data.tokens import token_sequences
from glowq.errors import FoldingError, ReferenceMismatchError
from glowq.evaluation.scores import score_models
from glowq.models.channel_scales import fit_columns, slopes
from glowq.models.reference import Reference
from glowq.models.reference_checks import check_revision
from glowq.models.tracing import trace_groups
from glowq.models.weight_errors import WeightErrors, changed_layers
from glowq.quantizers.model import prepare_model, read_weight
from support.bases import BASES, Base, rows, small_model
from support.folded import (
    ATTENTION,
    IDS,
    LLAMA,
    MODELS,
    fold,
    groups_of,
    llama,
    quantize,
    random_scales,
    relative,
    unfolding,
)
from support.tiny import CALIBRATION


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", MODELS)
def test_scales_folded_by_hand_are_found_and_the_reference_computes_the_same_in_their_space(
    kind: str, bits: int
) -> None:
    make, block, folds = MODELS[kind]
    reference, model = make(), make()
    scales: dict[str, Tensor] = {}
    for layer in range(2):
        for seed, (producer, consumers) in enumerate(folds):
            scale = fold(model.get_submodule(block.format(layer)), producer, consumers, seed + 10 * layer)
            scales |= {f"{block.format(layer)}.{name}": scale for name in consumers}
    with torch.no_grad():
        expected = reference(IDS).logits
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-3, atol=1e-3)
    names = [name for group in groups_of(model) for name in group.members]
    exact = {name: model.get_submodule(name).weight.detach().double().clone() for name in names}
    quantize(model, bits)
    found = unfolding(model, reference)
    errors = found.errors(groups_of(model))
    assert set(scales) == {name for name, scale in found.scales.items() if scale.columns is not None}
    exactly = {
        name for producer, consumers in folds for name in consumers if "proj" not in producer and "fc" not in producer
    }
    for name, scale in scales.items():
        columns = found.scales[name].columns
        assert columns is not None
        off = (columns.log() - scale.double().log()).abs()
        local = name.removeprefix("model.").removeprefix("decoder.").split(".", 2)[2]
        assert float(off.max()) < (1e-4 if local in exactly else 0.15 if bits < 4 else 0.08)
        assert float(off.square().mean().sqrt()) < (1e-5 if local in exactly else 0.04 if bits < 4 else 0.02)
    for group in groups_of(model):
        for name, error in zip(group.members, errors[group.name].split(list(group.out_features)), strict=True):
            quantized = model.get_submodule(name).weight
            true = relative(exact[name] - quantized, exact[name])
            assert relative(error, error + quantized) < 1.03 * true
            with torch.no_grad():
                quantized.add_(error)  # gives W', the weight before quantization
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-3, atol=1e-3)


def test_a_reference_on_disk_is_read_the_same(tmp_path: Path) -> None:
    reference, model = llama(), llama()
    reference.save_pretrained(tmp_path)
    for producer, consumers in LLAMA:
        fold(model.model.layers[1], producer, consumers, 3)
    groups = groups_of(quantize(model, 4))
    expected = unfolding(model, reference).errors(groups)
    with Reference(tmp_path, LlamaForCausalLM) as opened:
        found = WeightErrors(model, opened, unfolding(model, reference).backends)
        errors = found.errors(groups)
        assert all(parameter.is_meta for parameter in opened.model.parameters())
    assert all(torch.equal(errors[name], error) for name, error in expected.items())
    assert not any(name.startswith("model.layers.0") for name in found.scales)


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("spread", [0.0, 1.0])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_alone_is_taken_for_no_folding(bits: int, spread: float, symmetric: bool) -> None:
    reference = llama()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "proj" in name:  # columns of different size, as in models with outlier channels
                parameter *= (torch.randn(parameter.shape[1]) * spread).exp()
    model = quantize(copy.deepcopy(reference), bits, symmetric=symmetric)
    found = unfolding(model, reference)
    for name, error in found.errors(groups_of(model)).items():
        group = next(group for group in groups_of(model) if group.name == name)
        raw = [reference.get_submodule(m).weight - model.get_submodule(m).weight for m in group.members]
        assert torch.equal(error, torch.cat(raw))
    assert not found.scales


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("base", rows("nf4", "fp4", "torchao-int2", "torchao-int3", "torchao-int4", "gptq-4", "hqq-2"))
def test_libraries_that_fold_nothing_are_corrected_as_they_are(base: Base) -> None:
    model = base.load()
    backends = prepare_model(model)
    with Reference(small_model(), LlamaForCausalLM) as reference:
        check_revision(model, reference.model)
        found = WeightErrors(model, reference, backends)
        groups = trace_groups(model, {"input_ids": IDS}).groups
        errors = found.errors(groups)
        for group in groups:
            pairs = [
                (reference.weight(name, shape), read_weight(backends[name], name, model.get_submodule(name)))
                for name, shape in group.shapes.items()
            ]
            assert torch.equal(errors[group.name], torch.cat([full - quantized for full, quantized in pairs]))
            assert max(fit_columns(pairs).excess(), slopes(pairs, 1).excess()) < 1e-3
    assert not found.scales


def test_scaled_columns_without_a_producer_are_refused() -> None:
    reference, model = llama(), llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= random_scales(192, 1)
    quantize(model, 4)
    message = r"1\.mlp\.down_proj: its columns are scaled by 0\.\d\d to [23]\.\d\d .* in model\.layers\.1 holds"
    with pytest.raises(FoldingError, match=message):
        unfolding(model, reference).errors(groups_of(model))


def test_a_norm_whose_consumers_hold_other_scales_is_refused() -> None:
    reference, model = llama(), llama()
    fold(model.model.layers[0], "input_layernorm", ATTENTION, 1)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.copy_(
            reference.model.layers[0].input_layernorm.weight / random_scales(128, 2)
        )
    with pytest.raises(FoldingError, match=r"q_proj\+k_proj\+v_proj: its columns are scaled by"):
        unfolding(quantize(model, 4), reference).errors(groups_of(model))


def test_a_member_that_was_not_folded_with_its_group_is_refused() -> None:
    reference, model = llama(), llama()
    fold(model.model.layers[0], "input_layernorm", ATTENTION[:2], 1)
    with pytest.raises(FoldingError, match=r"v_proj: dividing out .* raises its error from 0\.0\d\d to 0\.\d\d\d"):
        unfolding(quantize(model, 4), reference).errors(groups_of(model))


def test_a_stranger_with_the_same_embeddings_is_refused() -> None:
    reference, model = llama(), quantize(llama(), 4)
    with torch.no_grad():
        reference.model.layers[0].mlp.up_proj.weight.normal_()
    with pytest.raises(ReferenceMismatchError, match=r"up_proj of the reference has cosine similarity -?0\.0"):
        unfolding(model, reference).errors(groups_of(model))


def test_rounded_norms_and_layers_that_cannot_be_probed_are_no_producers() -> None:
    class Gated(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((8,), value))

        def forward(self, x: Tensor, gate: Tensor) -> Tensor:
            return x * gate * self.weight

    class Shifted(Gated):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return x + self.weight

    class Paired(Gated):  # as I-BERT's layers, which return a scale of integers too
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return x * self.weight, self.weight

    def build(value: float) -> nn.Module:
        norm = nn.RMSNorm(8)
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(0.3, 1, 8) * value)
        others = {"gated": Gated(value), "shifted": Shifted(value), "paired": Paired(value)}
        return nn.ModuleDict({"norm": norm, **others})

    assert changed_layers(build(1.0).bfloat16(), build(1.0), {}) == {}
    assert list(changed_layers(build(0.5), build(1.0), {})) == ["norm"]
    assert changed_layers(build(0.5), build(1.0), {"norm": None}) == {}
    scale = changed_layers(build(0.5), build(1.0), {})["norm"]
    torch.testing.assert_close(scale, torch.full((8,), 2.0, dtype=torch.float64), rtol=1e-5, atol=0)


def test_another_revision_is_told_by_its_embeddings() -> None:
    model, reference = llama(), llama()
    opened = Reference(reference, LlamaForCausalLM)
    check_revision(model, opened.model)
    check_revision(copy.deepcopy(model).bfloat16(), opened.model)
    check_revision(copy.deepcopy(model).half(), opened.model)
    wide = copy.deepcopy(model)
    wide.resize_token_embeddings(80)
    check_revision(wide, opened.model)
    with torch.no_grad():
        noise = torch.randn_like(reference.model.embed_tokens.weight)
        reference.model.embed_tokens.weight += 0.01 * noise * reference.model.embed_tokens.weight.std()
    with pytest.raises(ReferenceMismatchError, match=r"the embeddings differ by 1\.0%: .* give the revision"):
        check_revision(model, opened.model)
    check_revision(model, opened.model, tolerance=0.02)
    check_revision(nn.Linear(2, 2), opened.model)


@pytest.fixture(scope="module")
def awq_checkpoint() -> Path:
    pytest.importorskip("gptqmodel")
    (base,) = (base for base in BASES if base.name == "awq-int4")
    return base.checkpoint(small_model())


def awq_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.slow
def test_awq_by_its_own_library_is_unfolded(awq_checkpoint: Path) -> None:
    model = awq_model(awq_checkpoint)
    backends = prepare_model(model)
    groups = trace_groups(model, {"input_ids": IDS}).groups
    with Reference(small_model(), LlamaForCausalLM) as reference:
        check_revision(model, reference.model)
        found = WeightErrors(model, reference, backends)
        errors = found.errors(groups)
        kept = set()
        for group in groups:
            parts = errors[group.name].split(list(group.out_features))
            for (name, shape), error in zip(group.shapes.items(), parts, strict=True):
                quantized = read_weight(backends[name], name, model.get_submodule(name))
                full = reference.weight(name, shape)
                after, before = relative(error, error + quantized), relative(full - quantized, full)
                assert after < 0.13  # rounding to nearest gives 0.10
                if name in found.scales:
                    assert after < 0.8 * before
                else:
                    kept.add(name.rpartition(".")[2])
    assert kept == {"o_proj"}  # with grouped heads, AWQ folds no scales into o_proj


@pytest.mark.slow
def test_an_awq_model_gets_back_what_it_really_lost(awq_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(small_model())
    ids = token_sequences(read_texts("python-stdlib:held-out"), tokenizer, length=128, limit=2048, seed=1)
    models = {"reference": AutoModelForCausalLM.from_pretrained(small_model(), dtype=torch.float32)}
    models |= {name: awq_model(awq_checkpoint) for name in ("quantized", "unfolded", "raw")}
    settings: dict[str, Any] = {"calibration": "python-stdlib", "tokenizer": tokenizer, "rank": 8, **CALIBRATION}
    glowq.correct(models["unfolded"], reference=small_model(), **settings)
    monkeypatch.setattr(WeightErrors, "_divide_columns", lambda *args: False)
    glowq.correct(models["raw"], reference=small_model(), force=True, **settings)  # it is worse than none
    scores = score_models(models, ids)
    lost = {name: float(scores[name].kl.mean()) for name in models}
    assert lost["unfolded"] < 0.9 * lost["quantized"]
    assert lost["raw"] > 1.5 * lost["unfolded"]
