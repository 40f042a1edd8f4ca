"""A saved correction is cut before it is read: loading gives the same factors, and reads no values of other factors."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import glowq
from glowq.artifact import factor_files
from glowq.artifact.saved import read_saved
from glowq.errors import ConfigError, CorrectionError, NonFiniteError, UnknownBaseError
from glowq.selection.budget import RankRequest
from support.corrections import changed
from support.tiny import load

few = settings(derandomize=True, max_examples=40, deadline=None, database=None)
CUTS = [
    {"budget": "5%"},
    {"budget": 9000, "rank_step": 2},
    {"budget": "9%", "rank_step": 4, "max_rank": 4},
    {"budget": "recover 40%"},
    {"budget": "recover 30%", "rank_step": 4},
    {"rank": 3},
    {"rank": 99},
]


def same(found: glowq.Correction, expected: glowq.Correction) -> None:
    assert found.config.to_dict() == expected.config.to_dict()
    assert found.ranks == expected.ranks
    ours, theirs = found.tensors(), expected.tensors()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in theirs)
    for mine, other in zip(found.factors, expected.factors, strict=True):
        assert mine.group == other.group
        assert mine.total == other.total
        assert torch.equal(mine.gains, other.gains)


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_the_same_as_reading_all_of_it_and_cutting(rank_8: Path, cut: dict[str, Any]) -> None:
    same(glowq.Correction.from_pretrained(rank_8, **cut), glowq.Correction.from_pretrained(rank_8).cut(**cut))


@few
@given(
    budget=st.one_of(st.integers(1, 53_248), st.integers(1, 99).map("recover {}%".format)),
    step=st.integers(1, 9),
    cap=st.one_of(st.none(), st.integers(9, 12)),
)
def test_the_same_for_any_cut(rank_8: Path, budget: Any, step: int, cap: int | None) -> None:
    whole, cut = glowq.Correction.from_pretrained(rank_8), {"budget": budget, "rank_step": step, "max_rank": cap}
    try:
        expected = whole.cut(**cut)
    except ConfigError as refused:
        message = str(refused)
    else:
        same(glowq.Correction.from_pretrained(rank_8, **cut), expected)
        return
    with pytest.raises(ConfigError) as error:
        glowq.Correction.from_pretrained(rank_8, **cut)
    assert str(error.value) == message


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """Record (tensor name, number of values) of every read from the files."""
    seen: list[tuple[str, int]] = []
    real = factor_files.safe_open

    class Slice:
        def __init__(self, part: Any, name: str) -> None:
            self.part, self.name = part, name

        def __getattr__(self, name: str) -> Any:
            assert name in ("get_shape", "get_dtype")
            return getattr(self.part, name)

        def __getitem__(self, place: Any) -> Any:
            found = self.part[place]
            seen.append((self.name, found.numel()))
            return found

    class Opened:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.file = real(*arguments, **options)

        def __enter__(self) -> Any:
            self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.__exit__(*error)

        def keys(self) -> list[str]:
            return self.file.keys()

        def get_slice(self, name: str) -> Slice:
            return Slice(self.file.get_slice(name), name)

        def get_tensor(self, name: str) -> Any:
            found = self.file.get_tensor(name)
            seen.append((name, found.numel()))
            return found

    with monkeypatch.context() as patch:
        patch.setattr(factor_files, "safe_open", Opened)
        yield seen


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_nothing_else_is_read_or_kept_in_memory(
    rank_8: Path, cut: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with watched(monkeypatch) as seen:
        found = glowq.Correction.from_pretrained(rank_8, **cut)
    assert sorted(seen) == sorted((name, tensor.numel()) for name, tensor in found.tensors().items())
    kept = [tensor for entry in found.factors for tensor in (entry.right, *entry.lefts.values())]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    assert sum(storages.values()) == found.factor_bytes
    assert all(tensor.is_contiguous() for tensor in kept)


def test_opening_reads_no_factor(rank_8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = glowq.Correction.from_pretrained(rank_8)
    with watched(monkeypatch) as seen:
        saved = read_saved(rank_8)
        assert saved.choose(RankRequest(budget="5%")) == whole.cut(budget="5%").ranks
        assert saved.headers.factor_bytes == whole.factor_bytes
    assert seen == []


def damaged(rank_8: Path, copy: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    shutil.copytree(rank_8, copy)
    found = load_file(copy / "glowq.safetensors")
    change(found)
    save_file(found, copy / "glowq.safetensors", metadata={"format": "pt"})
    return copy


class TestDamage:
    budget = "3%"

    def names(self, rank_8: Path) -> tuple[str, str]:
        """Return a group that the budget keeps in part, and a group that the budget leaves out."""
        ranks = glowq.Correction.from_pretrained(rank_8, budget=self.budget).ranks
        left_out = sorted(glowq.Correction.from_pretrained(rank_8).ranks.keys() - ranks.keys())
        return next(name for name, rank in ranks.items() if rank < 8), left_out[0]

    def test_values_that_are_not_kept_do_not_matter(self, rank_8: Path, tmp_path: Path) -> None:
        kept, left_out = self.names(rank_8)
        rank = glowq.Correction.from_pretrained(rank_8, budget=self.budget).ranks[kept]

        def damage_other_values(tensors: dict[str, torch.Tensor]) -> None:
            tensors[f"{left_out}.right"].fill_(math.nan)
            tensors[f"{kept}.right"][rank:] = math.inf

        copy = damaged(rank_8, tmp_path / "copy", damage_other_values)
        expected = glowq.Correction.from_pretrained(rank_8, budget=self.budget)
        same(glowq.Correction.from_pretrained(copy, budget=self.budget), expected)
        with pytest.raises(NonFiniteError, match="holds NaN or Inf"):
            glowq.Correction.from_pretrained(copy)

    def test_values_that_are_kept_do(self, rank_8: Path, tmp_path: Path) -> None:
        kept, _ = self.names(rank_8)
        copy = damaged(rank_8, tmp_path / "copy", lambda tensors: tensors[f"{kept}.right"][0, :1].fill_(math.nan))
        with pytest.raises(NonFiniteError, match=f"factor '{kept}.right' in .* holds NaN or Inf".replace("+", r"\+")):
            glowq.Correction.from_pretrained(copy, budget=self.budget)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda tensors, name: tensors.pop(name), "is missing; the correction is incomplete"),
            (lambda tensors, name: tensors.update({name: tensors[name][:2]}), r"has shape \(2, .*expected BF16 or F16"),
            (lambda tensors, name: tensors.update({name: tensors[name].int()}), "dtype I32, expected BF16 or F16"),
            (lambda tensors, name: tensors.update({"a.right": tensors[name] + 1}), "extra factor 'a.right'"),
        ],
        ids=["missing", "misshaped", "whole", "extra"],
    )
    def test_headers_of_what_is_not_kept_do(
        self, rank_8: Path, tmp_path: Path, change: Callable[..., Any], message: str
    ) -> None:
        _, left_out = self.names(rank_8)
        copy = damaged(rank_8, tmp_path / "copy", lambda tensors: change(tensors, f"{left_out}.right"))
        with pytest.raises(CorrectionError, match=message):
            glowq.Correction.from_pretrained(copy, budget=self.budget)

    def test_a_truncated_file(self, rank_8: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(rank_8, tmp_path / "copy"))
        content = (copy / "glowq.safetensors").read_bytes()
        (copy / "glowq.safetensors").write_bytes(content[:-1])
        with pytest.raises(CorrectionError, match="corrupt or truncated"):
            glowq.Correction.from_pretrained(copy, budget=self.budget)

    def test_one_factor_claimed_twice(self, rank_8: Path, tmp_path: Path) -> None:
        def repeat_members(stored: dict[str, Any]) -> None:
            first, second, *_ = (group for group in stored["groups"].values() if len(group["members"]) == 1)
            second.update(members=first["members"], out_features=first["out_features"])

        with pytest.raises(ConfigError, match=r"has the members of the group .* the factors of other modules"):
            glowq.Correction.from_pretrained(changed(rank_8, tmp_path / "copy", repeat_members), budget=self.budget)


def first_group(stored: dict[str, Any]) -> dict[str, Any]:
    group: dict[str, Any] = next(iter(stored["groups"].values()))
    return group


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: first_group(s)["gains"].__setitem__(0, "high"), "a gain of group .* at least 0, found 'high'"),
        (lambda s: first_group(s)["gains"].__setitem__(0, -1.0), r"a gain of group .* found -1\.0"),
        (lambda s: first_group(s)["gains"].__setitem__(0, math.nan), "a gain of group .* found nan"),
        (lambda s: first_group(s).update(gains="12345678"), "needs one gain per rank"),
        (lambda s: first_group(s).update(total=True), "total of group .* found True"),
        (lambda s: s["provenance"].update(total="all"), r"provenance\.total .* at least 0, found 'all'"),
    ],
)
def test_measurements_that_are_none(rank_8: Path, tmp_path: Path, change: Callable[..., Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        glowq.Correction.from_pretrained(changed(rank_8, tmp_path / "copy", change))


def test_no_library_of_the_base_is_needed_to_read_cut_and_save(
    rank_8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("glowq.quantizers.registry.is_installed", lambda backend: False)
    correction = glowq.Correction.from_pretrained(rank_8)
    correction.cut(rank=2).save_pretrained(tmp_path / "cut")
    assert glowq.Correction.from_pretrained(tmp_path / "cut").ranks == dict.fromkeys(correction.ranks, 2)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (rank_8, tmp_path / "cut"))
    assert after["quantization_config"]["base"] == before["quantization_config"]["base"]
    with pytest.raises(UnknownBaseError, match=r"bitsandbytes, which is not installed: pip install 'glowq\[bits"):
        load(rank_8)
