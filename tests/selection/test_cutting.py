"""Budgets, targets, rank steps and largest ranks, in every function and command that takes them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import glowq
from glowq.errors import ConfigError
from glowq.runtime.attach import attached
from support.cli import call, result_of
from support.corrections import changed
from support.tiny import CALIBRATION, TEXTS, corrected, gap, load, logits, quantized, tiny_llama


class TestCorrect:
    @pytest.mark.parametrize("method", ["glowq", "qera"])
    def test_rank_steps_and_a_cap(self, source: Path, method: str) -> None:
        limits: dict[str, Any] = {"rank_step": 8, "max_rank": 16}
        model, correction = corrected(
            source, "torchao-int2", rank=None, budget="60%", factor_dtype="float", method=method, **limits
        )
        assert set(correction.ranks.values()) == {8, 16}
        assert correction.factor_bytes <= 0.6 * correction.base_bytes
        assert {name: entry.rank for name, entry in attached(model).items()} == correction.ranks

    def test_a_shape_that_is_no_multiple(self, tmp_path: Path) -> None:
        narrow = tiny_llama(tmp_path / "narrow", intermediate_size=64)
        _, correction = corrected(narrow, "nf4", rank=None, budget="900%", rank_step=48)
        for name, rank in correction.ranks.items():  # the last ranks of attention gain nothing
            assert rank in ((64,) if name.endswith("down_proj") else (96, 128) if "attn" in name else (128,))
        capped = correction.cut(budget="900%", rank_step=48, max_rank=100)
        assert capped.ranks == {name: 64 if name.endswith("down_proj") else 96 for name in correction.ranks}

    def test_a_target(self, source: Path) -> None:
        model, correction = corrected(source, "nf4", rank=None, budget="recover 60%")
        assert 0.6 <= correction.predicted < 0.7
        assert {name: entry.rank for name, entry in attached(model).items()} == correction.ranks
        _, more = corrected(source, "nf4", rank=None, budget="recover 80%")
        assert more.predicted >= 0.8
        assert more.factor_bytes > correction.factor_bytes
        again = more.cut(budget="recover 60%")
        assert again.ranks == correction.ranks
        assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in correction.tensors().items())

    def test_a_target_out_of_reach_leaves_the_model_as_it_was(self, source: Path) -> None:
        model = quantized(source, "torchao-int3")
        before = logits(model)
        options: dict[str, Any] = {"calibration": TEXTS, "tokenizer": AutoTokenizer.from_pretrained(source)}
        with pytest.raises(ConfigError, match=r"out of reach: .* at most a predicted \d+\.\d% of the loss"):
            glowq.correct(model, reference=source, budget="recover 95%", max_rank=1, **options, **CALIBRATION)
        assert attached(model) == {}
        assert gap(model, before) == 0.0

    @pytest.mark.parametrize("limits", [{"rank_step": 8}, {"rank": 8, "rank_step": 8}, {"rank": 8, "max_rank": 8}])
    def test_limits_without_a_budget(self, source: Path, limits: dict[str, int]) -> None:
        with pytest.raises(ConfigError, match="give a budget with them"):
            glowq.correct(quantized(source, "nf4"), reference=source, calibration=TEXTS, **limits)

    def test_while_loading(self, source: Path) -> None:
        limits: dict[str, Any] = {"budget": "recover 50%", "rank_step": 2, "max_rank": 6}
        config = glowq.GlowQConfig(base="nf4", calibration=TEXTS, **limits, **CALIBRATION)
        model = load(source, quantization_config=config)
        after, correction = corrected(source, "nf4", rank=None, **limits)
        assert {name: entry.rank for name, entry in attached(model).items()} == correction.ranks
        assert set(correction.ranks.values()) <= {2, 4, 6}
        assert gap(model, logits(after)) == 0.0

    def test_from_the_command_line(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("\n".join(TEXTS))
        sizes = ["--calibration-tokens", 1024, "--sequence-length", 128, "--output", tmp_path / "out"]
        command = ["correct", source, "--base", "nf4", "--calibration", tmp_path / "notes.txt", *sizes]
        result = result_of(*command, "--budget", "Recover 50%", "--rank-step", 4, "--max-rank", 12)
        assert set(result["ranks"].values()) <= {4, 8, 12}
        assert glowq.Correction.from_pretrained(tmp_path / "out").predicted >= 0.5
        done = call(*command, "--budget", "recover 99.9%", "--max-rank", 2, "--json")
        assert done.exit_code == 1
        assert "is out of reach" in done.stderr

    @pytest.mark.parametrize(
        "options",
        [
            ["--rank-step", "8"],
            ["--rank", "8", "--rank-step", "8"],
            ["--rank", "8", "--max-rank", "8"],
            ["--budget", "1%", "--rank-step", "0"],
            ["--budget", "1%", "--max-rank", "0"],
            ["--budget", "1%", "--rank-step", "16", "--max-rank", "8"],
            ["--budget", "recover"],
            ["--budget", "recover 100%"],
        ],
    )
    def test_wrong_usage_is_status_2(self, options: list[str]) -> None:
        command = ["correct", "M", "--base", "nf4", "--calibration", "F", "--output", "O"]
        assert call(*command, *options).exit_code == 2


class TestTheWholeIsKnown:
    def test_after_groups_were_cut_away(self, rank_8: Path, tmp_path: Path) -> None:
        whole = glowq.Correction.from_pretrained(rank_8)
        assert whole.config.total == pytest.approx(whole.config.provenance.improvement["quantized"], rel=1e-3)
        assert whole.predicted == pytest.approx(
            sum(float(entry.gains.sum()) for entry in whole.factors) / whole.config.total
        )
        whole.cut(budget="2%").save_pretrained(tmp_path / "small")
        small = glowq.Correction.from_pretrained(tmp_path / "small")
        assert len(small.factors) < len(whole.factors)
        assert small.config.total == whole.config.total
        assert 0 < small.predicted < whole.predicted < 1

    def test_without_it_the_groups_left_are_the_whole(self, rank_8: Path, tmp_path: Path) -> None:
        copy = changed(rank_8, tmp_path / "copy", lambda stored: stored["provenance"].pop("total"))
        correction = glowq.Correction.from_pretrained(copy, budget="2%")
        assert correction.config.total == pytest.approx(sum(entry.total for entry in correction.factors))

    def test_a_target_is_a_share_of_the_whole(self, rank_8: Path, tmp_path: Path) -> None:
        whole = glowq.Correction.from_pretrained(rank_8)
        small = whole.cut(budget="recover 50%")
        assert small.predicted >= 0.5
        small.save_pretrained(tmp_path / "small")
        assert glowq.Correction.from_pretrained(tmp_path / "small", budget="recover 50%").ranks == small.ranks
        most = math.floor(1000 * small.predicted) / 10
        with pytest.raises(
            ConfigError, match=rf"at most a predicted {most:.1f}% .* larger budget .* \(--budget, --rank\)"
        ):
            glowq.Correction.from_pretrained(tmp_path / "small", budget="recover 80%")


class TestInterfaces:
    """`load_correction` and `GlowQConfig(correction=...)` cut a correction, and refuse what `glowq select` refuses."""

    def load(self, api: str, source: Path, rank_8: Path, **cut: Any) -> Any:
        if api == "load_correction":
            model = quantized(source, "nf4")
            glowq.load_correction(model, rank_8, **cut)
            return model
        return load(source, quantization_config=glowq.GlowQConfig(base="nf4", correction=str(rank_8), **cut))

    @pytest.fixture(params=["load_correction", "GlowQConfig"])
    def api(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.mark.parametrize(
        "cut", [{"budget": "9%", "rank_step": 4, "max_rank": 4}, {"budget": "recover 40%"}], ids=str
    )
    def test_a_cut(self, api: str, source: Path, rank_8: Path, tmp_path: Path, cut: dict[str, Any]) -> None:
        glowq.Correction.from_pretrained(rank_8).cut(**cut).save_pretrained(tmp_path / "cut")
        assert gap(self.load(api, source, rank_8, **cut), logits(load(tmp_path / "cut"))) == 0.0

    @pytest.mark.parametrize(
        ("cut", "message"),
        [
            ({"budget": "90%"}, r"budget '90%' is \d+ bytes, but .* has only \d+ \(\d+\.\d+%\); give less, or correct"),
            ({"budget": "1B"}, "1 bytes, but one rank of the smallest group takes"),
            ({"budget": 600, "rank_step": 8}, "600 bytes, but one step of 8 ranks of the smallest group takes 4096"),
            ({"budget": "9%", "rank_step": 16}, r"no group holds the 16 ranks .* \(the largest has 8\)"),
            ({"budget": "recover 99.9%"}, "is out of reach: these factors recover at most a predicted"),
            ({"budget": "much"}, "is neither a share"),
            ({"budget": "recover"}, "expected 'recover' and a share"),
            ({"rank_step": 8}, "give a budget with them"),
            ({"budget": "5%", "rank_step": 8, "max_rank": 4}, "max_rank 4 is below one rank_step of 8"),
        ],
    )
    def test_a_bad_cut(self, api: str, source: Path, rank_8: Path, cut: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            self.load(api, source, rank_8, **cut)

    @pytest.mark.parametrize("budget", ["5%", "recover 40%"])
    def test_nothing_measured(self, api: str, source: Path, rank_8: Path, tmp_path: Path, budget: str) -> None:
        def remove_gains(stored: dict[str, Any]) -> None:
            for group in stored["groups"].values():
                group["gains"] = [0.0] * group["rank"]

        copy = changed(rank_8, tmp_path / "copy", remove_gains)
        with pytest.raises(ConfigError, match=r"holds no measured gains to select by; `glowq correct --budget \.\.\.`"):
            self.load(api, source, copy, budget=budget)
        assert len(glowq.Correction.from_pretrained(copy, rank=2).factors) == 8  # a uniform rank needs no gains
        with pytest.raises(ConfigError, match="the correction holds no measured gains"):
            glowq.Correction.from_pretrained(copy).cut(budget=budget)

    def test_bytes_that_are_not_known(self, api: str, source: Path, rank_8: Path, tmp_path: Path) -> None:
        copy = changed(rank_8, tmp_path / "copy", lambda stored: stored.update(base_bytes=None))
        with pytest.raises(ConfigError, match="does not say how many bytes its quantized weights take"):
            self.load(api, source, copy, budget="1%")
