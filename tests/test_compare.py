"""`glowq compare`: every method within its bytes, figures paired, files all or nothing, and no text used twice."""

from __future__ import annotations

import json
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_cli import call, result_of
from tiny import logits, quantized, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

import glowq
from glowq.backends import prepare_model
from glowq.comparison import Comparison, compare_methods, score_entries, uniform_rank_within
from glowq.data import read_texts, token_sequences
from glowq.errors import EvaluationError
from glowq.evaluation import perplexity, score_models
from glowq.groups import Group
from glowq.methods import get_method
from glowq.overlap import WINDOW, check_disjoint, find_overlap
from glowq.runtime import attach, attached

METHODS = ["svd", "zeroquant", "lqer", "qera", "eora", "aser", "glowq-published", "glowq"]
BUDGETS = ["1%", "4%", "9%"]
SIZES = ["--calibration-tokens", "1024", "--tokens", "1024", "--sequence-length", "64"]
INTERVALS = ("perplexity", "kl", "top1", "ppl_ratio", "recovered")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    tiny_llama(folder / "model")
    library = Path(sysconfig.get_paths()["stdlib"])
    for target, names in (("train", ("csv.py", "shutil.py")), ("test", ("textwrap.py", "bisect.py", "argparse.py"))):
        (folder / f"{target}.txt").write_text("".join((library / name).read_text("utf-8") for name in names))
    return folder


@pytest.fixture(scope="module")
def command(folder: Path) -> list[Any]:
    texts = ["--calibration", folder / "train.txt", "--data", folder / "test.txt"]
    return ["compare", folder / "model", "--base", "nf4", *texts, *SIZES]


@pytest.fixture(scope="module")
def compared(folder: Path, command: list[Any]) -> tuple[dict[str, Any], Path]:
    """(what --json printed, the folder) of all methods at three budgets."""
    output = folder / "out"
    return result_of(*command, "--budgets", ",".join(BUDGETS), "--output", output), output


@pytest.fixture(scope="module")
def measured(folder: Path) -> tuple[Any, Comparison, torch.Tensor]:
    """(the quantized model, three methods at two budgets, report tokens), through Python."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    train, test = (
        token_sequences(read_texts(folder / f"{name}.txt"), tokenizer, length=64, limit=1024)
        for name in ("train", "test")
    )
    model = quantized(folder / "model", "nf4")
    options: dict[str, Any] = {"methods": ["svd", "qera", "glowq"], "budgets": ["24%", "9%"]}
    found = compare_methods(model, reference=str(folder / "model"), calibration=train, **options)
    return model, found, test


class TestResult:
    def test_keys(self, compared: tuple[dict[str, Any], Path], folder: Path) -> None:
        result, _ = compared
        assert set(result) == {
            *("model", "base", "reference", "base_bytes", "models", "rows", "pairs", "benefit", "calibration", "data"),
            *("sequence_length", "overlap", "seed", "glowq", "command", "output"),
        }
        assert [row["model"] for row in result["models"]] == ["reference", "quantized"]
        assert [(row["method"], row["budget"]) for row in result["rows"]] == [(m, b) for m in METHODS for b in BUDGETS]
        assert result["data"] == {"source": str(folder / "test.txt"), "tokens": 1024, "sequences": 16}
        assert result["overlap"]["windows"] == 0
        assert result["command"].startswith("glowq compare ")
        assert (result["seed"], result["glowq"]) == (0, glowq.__version__)

    def test_every_method_stays_within_its_bytes(self, compared: tuple[dict[str, Any], Path]) -> None:
        result, _ = compared
        for row in result["rows"]:
            assert row["budget_bytes"] == int(float(row["budget"][:-1]) / 100 * result["base_bytes"])
            assert row["factor_bytes"] <= row["budget_bytes"]
            assert (row["factor_bytes"] == 0) == (row["reason"] is not None)
        assert all(row["rank"] is None for row in result["rows"] if row["method"] == "glowq")

    def test_uniform_ranks_are_the_largest_that_fit(self, compared: tuple[dict[str, Any], Path]) -> None:
        for row in compared[0]["rows"]:
            if row["rank"] is not None:
                assert row["factor_bytes"] * (row["rank"] + 1) / row["rank"] > row["budget_bytes"]

    def test_a_budget_below_one_rank_of_every_group_says_so(self, compared: tuple[dict[str, Any], Path]) -> None:
        row = compared[0]["rows"][0]
        assert (row["method"], row["budget"], row["groups"]) == ("svd", "1%", 0)
        assert row["reason"].startswith("one rank of every group takes ")
        assert all(row[name] is None and row[f"{name}_ci95"] is None for name in INTERVALS)

    def test_intervals_hold_their_figures(self, compared: tuple[dict[str, Any], Path]) -> None:
        rows = [row for row in compared[0]["rows"] if row["reason"] is None]
        assert len(rows) > len(METHODS)
        for row in rows:
            for name in INTERVALS:
                if row[name] is not None:
                    assert row[f"{name}_ci95"][0] <= row[name] <= row[f"{name}_ci95"][1]

    def test_figures_agree_with_each_other(self, compared: tuple[dict[str, Any], Path]) -> None:
        result, _ = compared
        reference, plain = result["models"]
        assert (reference["kl"], reference["top1"]) == (0, 1)
        for row in result["rows"]:
            if row["reason"] is None:
                assert row["ppl_ratio"] == pytest.approx(row["perplexity"] / plain["perplexity"])
                gap = plain["perplexity"] - reference["perplexity"]
                share = (plain["perplexity"] - row["perplexity"]) / gap if gap > 0 else None
                assert row["recovered"] == (None if share is None else pytest.approx(share))

    def test_pairs_are_against_glowq_at_the_same_budget(self, compared: tuple[dict[str, Any], Path]) -> None:
        result, _ = compared
        rows = {(row["method"], row["budget"]): row for row in result["rows"]}
        assert result["pairs"]
        for pair in result["pairs"]:
            theirs, ours = (rows[pair[side], pair["budget"]] for side in ("method", "over"))
            assert pair["ppl_ratio"] == pytest.approx(theirs["perplexity"] / ours["perplexity"])
            assert (pair["factor_bytes"], pair["over_factor_bytes"]) == (theirs["factor_bytes"], ours["factor_bytes"])

    def test_equal_solves_say_so(self, compared: tuple[dict[str, Any], Path]) -> None:
        rows = {(row["method"], row["budget"]): row for row in compared[0]["rows"]}
        for name in ("eora", "aser"):
            assert rows[name, "9%"] == {**rows["qera", "9%"], "method": name, "same_as": "qera"}

    def test_benefit_is_of_every_layer_and_kind(self, compared: tuple[dict[str, Any], Path]) -> None:
        benefit = compared[0]["benefit"]
        assert benefit["layers"] == ["model.layers.0", "model.layers.1"]
        assert benefit["kinds"] == [
            *("self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj", "mlp.gate_proj+up_proj", "mlp.down_proj"),
        ]
        assert (benefit["unit"], benefit["budget"]) == ("nats", "9%")
        assert all(value >= 0 for row in benefit["values"] for value in row)
        assert sum(map(sum, benefit["values"])) > 0


class TestFiles:
    def test_json_is_what_was_printed(self, compared: tuple[dict[str, Any], Path]) -> None:
        result, output = compared
        stored = json.loads((output / "compare.json").read_text())
        assert f"--output {output}" in result["command"]
        assert stored == {
            key: value if key != "command" else value.replace(f"--output {output}", "--output DIR")
            for key, value in result.items()
            if key != "output"
        }

    def test_table(self, compared: tuple[dict[str, Any], Path]) -> None:
        result, output = compared
        text = (output / "table.md").read_text()
        rows = [line for line in text.splitlines() if line.startswith("| ")]
        assert len(rows) == 2 + 2 + len(result["rows"])
        assert all(row.count("|") == rows[0].count("|") for row in rows)
        assert "seed 0" in text
        assert "glowq compare" in text
        assert "aser is the same solve as qera." in text
        assert "Nothing bought by svd at 1%" in text

    def test_pictures(self, compared: tuple[dict[str, Any], Path]) -> None:
        for name in ("bytes.png", "heatmap.png"):
            data = (compared[1] / name).read_bytes()
            assert data.startswith(b"\x89PNG")
            assert len(data) > 5000

    def test_same_command_gives_the_same_bytes_and_replaces_its_result(self, folder: Path, command: list[Any]) -> None:
        few, contents = ["--methods", "svd,glowq", "--budgets", "6%"], []
        for name in ("first", "second", "first"):
            assert call(*command, *few, "--output", folder / name).exit_code == 0
            contents.append({file.name: file.read_bytes() for file in (folder / name).iterdir()})
        assert set(contents[0]) == {"compare.json", "table.md", "bytes.png", "heatmap.png"}
        assert contents[0] == contents[1] == contents[2]

    def test_no_heat_map_without_a_method_that_measures_benefit(self, folder: Path, command: list[Any]) -> None:
        few = ["--methods", "svd", "--budgets", "6%"]
        assert result_of(*command, *few, "--output", folder / "svd")["benefit"] is None
        assert sorted(file.name for file in (folder / "svd").iterdir()) == ["bytes.png", "compare.json", "table.md"]

    def test_a_folder_with_other_files_is_left_alone(self, folder: Path, command: list[Any]) -> None:
        done = call(*command, "--output", folder / "model")
        assert done.exit_code == 1
        assert "is not empty" in done.stderr

    def test_a_comparison_is_not_replaced_by_a_correction(self, compared: tuple[dict[str, Any], Path]) -> None:
        with pytest.raises(glowq.GlowQError, match=r"is not empty and holds 'bytes\.png'"):
            glowq.files.check_output(compared[1])

    def test_for_people(self, command: list[Any]) -> None:
        done = call(*command, "--methods", "glowq", "--budgets", "0.00001%,5%")
        assert done.exit_code == 0, done.stderr
        assert "by gain" in done.stdout
        assert "Nothing bought by glowq at 0.00001%: one rank of the cheapest group takes" in done.stdout


class TestMeasuring:
    def test_the_model_is_left_as_it_was(self, measured: tuple[Any, Comparison, torch.Tensor], folder: Path) -> None:
        model, _, _ = measured
        assert attached(model) == {}
        fresh = quantized(folder / "model", "nf4")
        prepare_model(fresh)
        assert torch.equal(logits(model), logits(fresh))

    def test_scores_are_those_of_each_correction_attached_alone(
        self, measured: tuple[Any, Comparison, torch.Tensor], folder: Path
    ) -> None:
        model, found, sequences = measured
        reference = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto")
        scores = score_entries(reference, model, found.entries, sequences)
        assert list(scores) == ["reference", "quantized", *(entry.label for entry in found.entries)]
        for entry in found.entries:
            for factors in entry.factors:
                attach(model, factors)
            alone = score_models({"reference": reference, "alone": model}, sequences)
            glowq.detach(model)
            for name in ("nll", "kl", "top1"):  # of the same sequences, in the same order: paired
                assert torch.equal(getattr(scores[entry.label], name), getattr(alone["alone"], name))
            assert torch.equal(scores["reference"].nll, alone["reference"].nll)

    def test_one_solve_serves_every_budget(self, measured: tuple[Any, Comparison, torch.Tensor]) -> None:
        _, found, _ = measured
        entries = {(entry.method, entry.budget): entry for entry in found.entries}
        for name in ("svd", "qera"):
            large, small = entries[name, "24%"], entries[name, "9%"]
            assert large.rank is not None
            assert small.rank is not None
            assert small.rank < large.rank
            for more, less in zip(large.factors, small.factors, strict=True):
                assert torch.equal(less.right, more.right[: less.rank])

    def test_better_methods_come_closer_to_the_reference(
        self, measured: tuple[Any, Comparison, torch.Tensor], folder: Path
    ) -> None:
        model, found, sequences = measured
        reference = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto")
        scores = score_entries(reference, model, found.entries, sequences)
        divergence = {name: float(score.kl.mean()) for name, score in scores.items()}
        assert divergence["glowq at 9%"] < divergence["svd at 9%"] < divergence["quantized"]
        assert perplexity(scores["glowq at 9%"]) > 0


@pytest.mark.parametrize("shared", [True, False])
def test_uniform_rank_is_the_largest_within_the_bytes(shared: bool) -> None:
    groups = [Group("a", ("a", "b"), 8, (3, 5), ""), Group("c", ("c",), 2, (9,), "")]

    def cost(rank: int) -> int:
        parts = [(8, 8), (9, 2)] if shared else [(3, 8), (5, 8), (9, 2)]
        return sum(2 * (outputs + inputs) * min(rank, outputs, inputs) for outputs, inputs in parts)

    for available in range(0, cost(8) + 40):
        rank = uniform_rank_within(groups, available, 2, shared=shared)
        assert cost(rank) <= available
        assert rank == (8 if shared else 5) or cost(rank + 1) > available


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_nested(name: str) -> None:
    """What lets one solve serve every budget."""
    from test_methods import measured as moments_of

    error, moments = moments_of()
    solve = get_method(name).solve
    small, large = solve(error, moments, 3, 0), solve(error, moments, 9, 0)
    torch.testing.assert_close(
        small.left @ small.right, large.left[:, :3] @ large.right[:3], rtol=0.0, atol=1e-4 * float(error.abs().max())
    )


class TestOverlap:
    IDS = torch.randint(0, 4096, (12, 100), generator=torch.Generator().manual_seed(0))

    def test_none(self) -> None:
        found = find_overlap(self.IDS[:6], self.IDS[6:])
        assert (found.window, found.windows, found.of, found.sequences) == (WINDOW, 0, 6 * 37, 0)

    def test_a_window_at_another_offset(self) -> None:
        report = self.IDS[6:].clone()
        report[2, 5 : 5 + WINDOW] = self.IDS[1, 30 : 30 + WINDOW]
        found = find_overlap(self.IDS[:6], report)
        assert (found.windows, found.sequences) == (1, 1)
        report[2, 5] += 1
        assert find_overlap(self.IDS[:6], report).windows == 0

    def test_short_sequences_are_compared_whole(self) -> None:
        found = find_overlap(self.IDS[:, :20], self.IDS[3:5, :20])
        assert (found.window, found.windows, found.of, found.sequences) == (20, 2, 2, 2)

    def test_refusal_says_how_much(self) -> None:
        with pytest.raises(EvaluationError, match=r"100\.0% of its windows of 64 tokens, in 2 of 2 sequences"):
            check_disjoint(self.IDS, self.IDS[:2])
        assert check_disjoint(self.IDS, self.IDS[:2], force=True).sequences == 2

    def test_the_two_parts_of_the_standard_library_share_none(self, folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        train, test = (
            token_sequences(read_texts(name), tokenizer, length=256, limit=32768)
            for name in ("python-stdlib", "python-stdlib:held-out")
        )
        assert check_disjoint(train, test).windows == 0

    def test_command_refuses_and_can_be_forced(self, folder: Path, command: list[Any]) -> None:
        same = [folder / "train.txt" if part == folder / "test.txt" else part for part in command]
        few = ["--methods", "svd", "--budgets", "6%"]
        done = call(*same, *few, "--output", folder / "never")
        assert done.exit_code == 1
        assert "the report text overlaps the calibration text: " in done.stderr
        assert not (folder / "never").exists()
        result = result_of(*same, *few, "--force", "--output", folder / "forced")
        assert result["overlap"]["forced"] is True
        assert result["overlap"]["windows"] > 0
        assert "was calibrated on (--force)" in (folder / "forced" / "table.md").read_text()


class TestRefused:
    def test_unknown_method(self, command: list[Any]) -> None:
        done = call(*command, "--methods", "svd,best")
        assert done.exit_code == 1
        assert "method must be one of aser, " in done.stderr

    @pytest.mark.parametrize("option", ["--methods", "--tasks", "--budgets"])
    def test_an_empty_list_is_wrong_usage(self, command: list[Any], option: str) -> None:
        assert call(*command, option, " ,").exit_code == 2

    @pytest.mark.parametrize("budgets", ["1%,much", "0%"])
    def test_budgets_that_are_none_are_wrong_usage(self, command: list[Any], budgets: str) -> None:
        assert call(*command, "--budgets", budgets).exit_code == 2

    def test_without_matplotlib(self, folder: Path, command: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("glowq.plots.find_spec", lambda name: None)
        done = call(*command, "--output", folder / "never")
        assert done.exit_code == 1
        assert "pip install 'glowq[plot]'" in done.stderr
        assert not (folder / "never").exists()
        assert call(*command, "--methods", "svd", "--budgets", "6%").exit_code == 0

    def test_without_the_harness(self, command: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("glowq.cli.tasks.find_spec", lambda name: None)
        done = call(*command, "--tasks", "arc_easy")
        assert done.exit_code == 1
        assert "pip install lm_eval" in done.stderr


class TestTasks:
    @pytest.fixture
    def harness(self, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
        """A stand-in for lm-evaluation-harness that remembers its calls, and counts the groups that it was given."""
        calls: list[dict[str, Any]] = []

        def simple_evaluate(**options: Any) -> dict[str, Any]:
            if "no_such_task" in options["tasks"]:
                raise KeyError("no_such_task")
            calls.append(options)
            score = len(attached(options["model"].model)) / 100
            return {"results": {"arc": {"alias": "arc", "acc,none": score, "acc_stderr,none": 0.01, "sample_len": 9}}}

        class HFLM:
            def __init__(self, pretrained: Any, tokenizer: Any) -> None:
                self.model = pretrained

        harness, models, huggingface = (ModuleType(f"lm_eval{rest}") for rest in ("", ".models", ".models.huggingface"))
        harness.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
        huggingface.HFLM = HFLM  # type: ignore[attr-defined]
        for module in (harness, models, huggingface):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr("glowq.cli.tasks.find_spec", lambda name: harness if name == "lm_eval" else find_spec(name))
        return calls

    def test_every_model_is_run(self, command: list[Any], harness: list[dict[str, Any]]) -> None:
        result = result_of(*command, "--methods", "svd,qera,eora", "--budgets", "6%", "--tasks", "arc", "--seed", "3")
        scores = {model: found["arc"]["acc"]["value"] for model, found in result["tasks"].items()}
        assert all(set(found["arc"]) == {"acc"} for found in result["tasks"].values())
        assert scores == {"reference": 0, "quantized": 0, "svd at 6%": 0.08, "qera at 6%": 0.14, "eora at 6%": 0.14}
        assert result["tasks"]["svd at 6%"]["arc"]["acc"]["ci95"] == pytest.approx([0.0604, 0.0996])
        assert len(harness) == 4  # eora is qera
        assert {options["fewshot_random_seed"] for options in harness} == {3}

    def test_unknown_task(self, command: list[Any], harness: list[dict[str, Any]]) -> None:
        done = call(*command, "--methods", "svd", "--budgets", "6%", "--tasks", "no_such_task")
        assert done.exit_code == 1
        assert "lm-evaluation-harness cannot run no_such_task" in done.stderr
