"""What more bits would undo in the bytes of a correction: the arithmetic, a measurement, and where it is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import glowq
from glowq.artifact.correction import Correction
from glowq.factors.factors import GroupFactors
from glowq.factors.group import Group
from glowq.pipeline.more_bits import predict_more_bits
from glowq.quantizers.model import packed_bytes, prepare_model
from glowq.quantizers.registry import base_config
from support.bases import small_model
from support.cli import MODEL, call, result_of
from support.tiny import load

QKV, DOWN = "model.layers.0.self_attn.q_proj+k_proj+v_proj", "model.layers.1.mlp.down_proj"


def model_of(base: str) -> Any:
    model = load(small_model(), dtype="auto", quantization_config=base_config(base)).eval()
    prepare_model(model)
    return model


def factors_of(model: Any, totals: dict[str, float]) -> list[GroupFactors]:
    found = []
    for name, total in totals.items():
        prefix, _, kinds = name.rpartition(".")
        members = tuple(f"{prefix}.{kind}" for kind in kinds.split("+"))
        layers = [model.get_submodule(member) for member in members]
        group = Group(name, members, layers[0].in_features, tuple(layer.out_features for layer in layers), prefix)
        lefts = {member: torch.zeros(layer.out_features, 1) for member, layer in zip(members, layers, strict=True)}
        right = torch.zeros(1, group.in_features)
        found.append(GroupFactors(group, right, lefts, torch.zeros(1, dtype=torch.float64), total))
    return found


def weights_of(entry: GroupFactors) -> int:
    return entry.group.in_features * sum(entry.group.out_features)


@pytest.mark.parametrize(
    ("base", "library", "bits", "left"),
    [
        ("torchao-int2", "torchao", 3, (3 / 7) ** 2),
        ("torchao-int3", "torchao", 4, (7 / 15) ** 2),
        ("torchao-int4", "torchao", 8, (15 / 255) ** 2),
        ("hqq-3", "hqq", 4, (7 / 15) ** 2),
    ],
)
def test_the_next_width(base: str, library: str, bits: int, left: float) -> None:
    pytest.importorskip(library)
    model = model_of(base)
    first, second = factors = factors_of(model, {QKV: 3.0, DOWN: 1.0})
    costs = [(bits - int(base[-1])) * weights_of(entry) // 8 for entry in (first, second)]
    for available, gains in {costs[0] - 1: [], costs[0]: [3.0], sum(costs): [3.0, 1.0]}.items():
        if available >= costs[1] and not gains:
            gains = [1.0]
        found = predict_more_bits(model, factors, available, 4.0)
        assert found == {"predicted": pytest.approx(sum(gains) * (1 - left) / 4), "bits": bits}


def test_full_precision_where_the_library_has_one_width() -> None:
    model = model_of("nf4")
    factors = factors_of(model, {QKV: 3.0, DOWN: 1.0})
    dense = 2 * weights_of(factors[0])
    packed = dense // 4 + dense // 2 // 64 * 4  # 4 bits a value, and one float32 for 64
    assert predict_more_bits(model, factors, dense - packed, 4.0) == {"predicted": 0.75, "bits": 16}
    assert predict_more_bits(model, factors[:1], dense - packed - 1, 4.0) == {"predicted": 0.0, "bits": 16}


def test_nothing_where_a_base_cannot_mix() -> None:
    model = load(small_model()).eval()
    assert predict_more_bits(model, [], 1000, 1.0) is None


@pytest.mark.slow
def test_it_is_near_to_the_measurement(tmp_path: Path) -> None:
    """Of the bundled model, whose mixed checkpoint `glowq compare --alternatives` makes and measures."""
    pytest.importorskip("torchao")
    text = ["--calibration", "python-stdlib", "--calibration-tokens", "4096", "--sequence-length", "256"]
    made = result_of("correct", MODEL, "--base", "torchao-int3", *text, "--budget", "6%", "--output", tmp_path / "out")
    report = ["--data", "python-stdlib:held-out", "--tokens", "2048", "--methods", "glowq", "--budgets", "6%"]
    rows = result_of("compare", MODEL, "--base", "torchao-int3", *text, *report, "--alternatives")["rows"]
    (measured,) = (row["undone"] for row in rows if row["method"] == "mixed")
    assert made["instead"]["bits"] == 4
    assert abs(made["instead"]["predicted"] - measured) < 0.1


class TestWhereItIsSaid:
    def test_in_the_last_line_if_bits_are_predicted_to_win(self, tmp_path: Path) -> None:
        pytest.importorskip("torchao")
        size = ["--calibration-tokens", "2048", "--sequence-length", "64", "--budget", "30%", "--force"]
        command = ["correct", small_model(), "--base", "torchao-int3", "--calibration", "python-stdlib", *size]
        done = call(*command, "--output", tmp_path / "out")
        assert done.exit_code == 0, done.stderr
        stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["provenance"]
        found, wins = stored["instead"], "instead" in done.stdout
        predicted = Correction.from_pretrained(tmp_path / "out").predicted
        assert wins == (found["predicted"] >= max(predicted, undone(stored["improvement"])) + 0.03)


def undone(improvement: dict[str, float]) -> float:
    return 1 - improvement["corrected"] / improvement["quantized"]


def test_a_part_of_the_correction_does_not_keep_it() -> None:
    model = model_of("torchao-int3")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (16, 64), generator=generator)
    reference = load(small_model()).eval()
    correction = glowq.correct(
        model, reference=reference, calibration=ids, budget="9%", factor_dtype="float", force=True
    )
    found = correction.config.provenance.instead
    assert found is not None
    assert 0 < correction.factor_bytes <= 0.09 * packed_bytes(model)
    assert correction.cut(budget="4%").config.provenance.instead is None
    assert correction.rounded("int8").config.provenance.instead is None
