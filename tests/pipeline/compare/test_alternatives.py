"""Alternatives to a correction: their bytes are those of the saved files, and their scores those of the same models."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from glowq.data.text import read_texts
from glowq.data.tokens import token_sequences
from glowq.evaluation.scores import Score, score_models
from glowq.factors.group import Group
from glowq.pipeline.compare.alternatives import Alternative, alternatives_of
from glowq.pipeline.wider_groups import WiderGroup, best_within
from glowq.quantizers.model import packed_bytes, prepare_model
from glowq.quantizers.registry import base_config
from support.bases import small_model
from support.tiny import gap, library_texts, load, logits

BUDGETS = {"0.001%": 20, "3%": 20_000, "12%": 80_000}
MEMBERS = {
    "self_attn.q_proj+k_proj+v_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_proj+up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}

Found = dict[str, tuple[Alternative, Score | None]]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensor, Tensor]:
    folder = tmp_path_factory.mktemp("texts")
    library_texts(folder)
    tokenizer = AutoTokenizer.from_pretrained(small_model())
    train, test = (
        token_sequences(read_texts(folder / f"{name}.txt"), tokenizer, length=64, limit=1024)
        for name in ("train", "test")
    )
    return train, test


def prepared(config: Any) -> Any:
    model = load(small_model(), dtype="auto", quantization_config=config).eval()
    prepare_model(model)
    return model


def found_for(base: str, texts: tuple[Tensor, Tensor], budgets: dict[str, int]) -> Found:
    model, full = prepared(base_config(base)), load(small_model(), dtype="auto").eval()
    before = logits(model)
    found = alternatives_of(
        model, full, base_config(base), prepared, calibration=texts[0], sequences=texts[1], budgets=budgets
    )
    assert gap(model, before) == 0.0
    return {other.label: (other, score) for other, score in found}


@pytest.fixture(scope="module")
def int3(texts: tuple[Tensor, Tensor]) -> Found:
    pytest.importorskip("torchao")
    return found_for("torchao-int3", texts, BUDGETS)


def modules(widened: Sequence[str]) -> list[str]:
    found = []
    for name in widened:
        block, kind = name.split(".")[:3], ".".join(name.split(".")[3:])
        found += [".".join([*block, member]) for member in MEMBERS[kind]]
    return found


def by_hand(bits: int, group: int, wide: Sequence[str] = ()) -> Any:
    """torchao's config as a user writes it: int4 for `wide`, `bits` for all others."""
    from torchao.quantization import FqnToConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from transformers import TorchAoConfig

    plain = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(group))
    if not wide:
        return TorchAoConfig(plain)
    wider = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(group))
    by_name = OrderedDict([(f"{name}.weight", wider) for name in wide])
    return TorchAoConfig(FqnToConfig(by_name | {r"re:.*_proj\.weight": plain}))


def stored_bytes(folder: Path, bits: int, wide: Sequence[str]) -> int:
    """Bytes of the quantized weights in a file of torchao, which stores a byte for each value, at their widths."""
    found = 0
    for key, tensor in load_file(folder / "model.safetensors").items():
        if key.endswith("_weight_qdata"):
            name = key.removesuffix("._weight_qdata")
            found += tensor.numel() * (4 if name in wide else bits) // 8
        elif key.endswith("_weight_scale"):
            found += tensor.numel() * tensor.element_size()
    return found


class TestTorchAO:
    def test_what_there_is(self, int3: Found) -> None:
        assert list(int3) == ["finer", "wider", *(f"mixed at {budget}" for budget in BUDGETS)]
        finer, wider = int3["finer"][0], int3["wider"][0]
        assert finer.settings == "int3, groups of 32, symmetric"
        assert wider.settings == "int4, groups of 64, symmetric"
        nothing, score = int3["mixed at 0.001%"]
        assert (nothing.added_bytes, nothing.widened, score) == (0, (), None)
        assert "the cheapest takes more than the budget" in str(nothing.reason)

    @pytest.mark.parametrize("label", ["finer", "wider", "mixed at 3%", "mixed at 12%"])
    def test_bytes_and_scores_are_those_of_a_model_made_by_hand(
        self, int3: Found, label: str, texts: tuple[Tensor, Tensor], tmp_path: Path
    ) -> None:
        other, score = int3[label]
        bits, group = {"finer": (3, 32), "wider": (4, 64)}.get(label, (3, 64))
        wide = modules(other.widened)
        model = load(small_model(), dtype="auto", quantization_config=by_hand(bits, group, wide)).eval()
        full = load(small_model(), dtype="auto").eval()
        alone = score_models({"full": full, "other": model}, texts[1])["other"]
        assert score is not None
        for name in ("nll", "kl", "top1"):
            assert torch.equal(getattr(score, name), getattr(alone, name))
        model.save_pretrained(tmp_path)
        base_bytes = packed_bytes(prepared(base_config("torchao-int3")))
        assert other.added_bytes == stored_bytes(tmp_path, bits, wide) - base_bytes

    def test_a_mixture_fits_in_its_budget_and_uses_it(self, int3: Found) -> None:
        small, large = int3["mixed at 3%"][0], int3["mixed at 12%"][0]
        for other in (small, large):
            assert other.budget_bytes is not None
            assert 0 < other.added_bytes <= other.budget_bytes
            assert f"{len(modules(other.widened))} of 14 modules int4, groups of 64, symmetric" == other.settings
        assert len(large.widened) > len(small.widened)

    def test_better_than_the_base(self, int3: Found, texts: tuple[Tensor, Tensor]) -> None:
        full = load(small_model(), dtype="auto").eval()
        plain = score_models({"full": full, "base": prepared(base_config("torchao-int3"))}, texts[1])["base"]
        scores = {label: float(score.kl.mean()) for label, (_, score) in int3.items() if score is not None}
        assert scores["wider"] < scores["mixed at 12%"] < scores["mixed at 3%"] < float(plain.kl.mean())


def test_full_precision_is_the_wider_half_of_a_mixture_with_bitsandbytes(texts: tuple[Tensor, Tensor]) -> None:
    pytest.importorskip("bitsandbytes")
    found = found_for("nf4", texts, {"40%": 350_000})
    assert "the block of bitsandbytes, which is 64 values" in str(found["finer"][0].reason)
    assert found["wider"][0].settings == "int8, one scale a row"
    other, score = found["mixed at 40%"]
    assert score is not None
    dense = load_file(small_model() / "model.safetensors")
    values = sum(dense[f"{name}.weight"].numel() for name in modules(other.widened))
    # two bytes in the place of half a byte and a scale of four bytes for 64 values
    assert other.added_bytes == 2 * values - values // 2 - values // 16
    assert other.settings == f"{len(modules(other.widened))} of 14 modules bfloat16"


def group(name: str, added: int, gain: float) -> WiderGroup:
    return WiderGroup(Group(name, (name,), 8, (8,), name), added, gain)


def test_the_best_groups_within_a_budget() -> None:
    groups = [group("a", 10, 1.0), group("b", 40, 8.0), group("c", 10, -1.0), group("d", 10, 1.5), group("e", 5, 0.0)]

    def chosen(available: int) -> list[str]:
        return [entry.group.name for entry in best_within(groups, available)]

    assert chosen(9) == []
    assert chosen(15) == ["d"]
    assert chosen(39) == ["a", "d"]  # the best one does not fit and is passed over
    assert chosen(40) == ["b"]
    assert chosen(50) == ["b", "d"]
    assert chosen(1000) == ["a", "b", "d"]  # in the order given; what gains nothing is never chosen
