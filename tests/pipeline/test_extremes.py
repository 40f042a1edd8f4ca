"""Models at the ends of the number ranges, corrected through `glowq.correct`.

A model whose up projection is multiplied by a number, and its down projection divided by it, gives the same answers. So
does its correction.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import glowq
from glowq.errors import NonFiniteError
from support.tiny import load, quantized, tiny_llama

IDS = torch.randint(5, 4096, (64, 32), generator=torch.Generator().manual_seed(0))


def projections(model: Any, *names: str) -> list[nn.Linear]:
    return [module for name, module in model.named_modules() if name.rpartition(".")[2] in names]


def shifted(first: str, second: str, factor: float) -> Callable[[Any], None]:
    """Multiply one projection and divide another, so that the model computes the same."""

    def change(model: Any) -> None:
        for name, by in ((first, factor), (second, 1 / factor)):
            for module in projections(model, name):
                module.weight.data.mul_(by)

    return change


def channels(factor: float) -> Callable[[Any], None]:
    """Multiply every seventh channel that the MLPs read."""

    def change(model: Any) -> None:
        for block in model.model.layers:
            block.post_attention_layernorm.weight.data[::7] *= factor

    return change


def same(model: Any) -> None:
    pass


def corrected(folder: Path, change: Callable[[Any], None], dtype: torch.dtype, **options: Any) -> dict[str, Any]:
    """The measured improvement of a correction of a model with one change, made without refusing a bad one."""
    model = load(tiny_llama(folder, dtype=torch.float32, initializer_range=0.1))
    change(model)
    model.to(dtype).save_pretrained(folder)
    options = {"rank": 8, "method": "glowq-one-sided", "force": True, **options}
    correction = glowq.correct(quantized(folder, "nf4", dtype=dtype), reference=folder, calibration=IDS, **options)
    for factor in correction.tensors().values():
        assert bool(torch.isfinite(factor).all())
    found = correction.config.provenance.improvement
    assert found is not None
    return dict(found)


def share(found: dict[str, Any]) -> float:
    return 1 - float(found["corrected"]) / float(found["quantized"])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> float:
    return share(corrected(tmp_path_factory.mktemp("plain"), same, torch.float32))


@pytest.mark.parametrize("factor", [1e-30, 1e30, *(pytest.param(f, marks=pytest.mark.long) for f in (1e-15, 1e15))])
@pytest.mark.parametrize(("first", "second"), [("up_proj", "down_proj"), ("v_proj", "o_proj")])
def test_weights_of_any_size(first: str, second: str, factor: float, plain: float, tmp_path: Path) -> None:
    found = share(corrected(tmp_path / "model", shifted(first, second, factor), torch.float32))
    assert plain > 0.1
    assert found == pytest.approx(plain, abs=0.03)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_activations_near_the_largest_of_float16(dtype: torch.dtype, plain: float, tmp_path: Path) -> None:
    """The inputs of the down projections reach 5e4; 65504 is the largest float16."""
    change = shifted("up_proj", "down_proj", 4e3)
    assert share(corrected(tmp_path / "model", change, dtype)) == pytest.approx(plain, abs=0.03)


@pytest.mark.parametrize("method", ["glowq", "glowq-one-sided"])
@pytest.mark.parametrize("factor", [0.0, 1e3])
def test_dead_and_massive_channels(factor: float, method: str, tmp_path: Path) -> None:
    assert share(corrected(tmp_path / "model", channels(factor), torch.float32, method=method)) > 0.1


def test_a_model_beyond_the_range_of_its_dtype_is_refused_by_name(tmp_path: Path) -> None:
    change = shifted("up_proj", "down_proj", 6e4)
    for method in ("glowq", "svd"):
        with pytest.raises(NonFiniteError, match=r"down_proj: its input holds NaN or Inf\. The model itself is broken"):
            corrected(tmp_path / "model", change, torch.float16, method=method)


@pytest.mark.parametrize("length", [32, 31])
def test_the_split_into_batches_does_not_matter(length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The labels of the gradients are drawn in the same order, whatever is in one batch."""
    source = tiny_llama(tmp_path, dtype=torch.float32)  # products in bfloat16 round differently in other batches

    def made() -> tuple[dict[str, Tensor], Any]:
        model = quantized(source, "nf4", dtype=torch.float32)
        correction = glowq.correct(model, reference=source, calibration=IDS[:33, :length], rank=4, force=True)
        parts = {entry.group.name: (torch.cat(list(entry.lefts.values())), entry.right) for entry in correction.factors}
        return {name: left.double() @ right.double() for name, (left, right) in parts.items()}, correction

    expected, first = made()
    for name in ("problem._GRADIENT_BATCH", "block_solver._BATCH_TOKENS"):
        monkeypatch.setattr(f"glowq.pipeline.{name}", 100)  # three sequences
    monkeypatch.setattr("glowq.evaluation.improvement._BATCH_TOKENS", 1)
    found, second = made()
    for name, matrix in expected.items():
        assert float((found[name] - matrix).norm() / matrix.norm()) < 1e-5
    before, after = (part.config.provenance.improvement["benefit"] for part in (first, second))
    assert after["value"] == pytest.approx(before["value"], rel=0.02)
