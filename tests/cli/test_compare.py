"""`glowq compare`: every method stays within its bytes, the figures are consistent, all files are written or none."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import glowq
from glowq.cli.reports.comparison_files import markdown, write_comparison
from glowq.factors import integers
from glowq.utils.manifest import MANIFEST
from glowq.utils.output import check_output
from support import writers
from support.bases import small_model
from support.cli import call, result_of

METHODS = ["svd", "zeroquant", "lqer", "qera", "eora", "aser", "glowq-published", "glowq"]
BUDGETS = ["1%", "4%", "9%"]
SIZES = ["--calibration-tokens", "1024", "--tokens", "1024", "--sequence-length", "64"]
INTERVALS = ("perplexity", "kl", "top1", "ppl_ratio", "recovered")


@pytest.fixture(scope="module")
def folder(compared_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(compared_folder, tmp_path_factory.mktemp("compare"), dirs_exist_ok=True))


@pytest.fixture(scope="module")
def command(folder: Path) -> list[Any]:
    texts = ["--calibration", folder / "train.txt", "--data", folder / "test.txt"]
    return ["compare", folder / "model", "--base", "nf4", *texts, *SIZES]


@pytest.fixture(scope="module")
def compared(folder: Path, command: list[Any]) -> tuple[dict[str, Any], Path]:
    """The result of --json and the output folder, for all methods at three budgets."""
    output = folder / "out"
    return result_of(*command, "--budgets", ",".join(BUDGETS), "--output", output), output


class TestResult:
    def test_keys(self, compared: tuple[dict[str, Any], Path], folder: Path) -> None:
        result, _ = compared
        assert set(result) == {
            *("model", "base", "reference", "base_bytes", "models", "rows", "pairs", "benefit", "calibration", "data"),
            *("sequence_length", "overlap", "seed", "glowq", "command", "output", "timeline", "peak_rss_bytes"),
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

    def test_what_was_predicted_is_said_of_ranks_that_follow_gains(self, compared: tuple[dict[str, Any], Path]) -> None:
        result, output = compared
        for row in result["rows"]:
            assert (row["predicted"] is None) == (row["method"] != "glowq")
        most = next(row["predicted"] for row in result["rows"] if (row["method"], row["budget"]) == ("glowq", "9%"))
        assert 0 < most < 1
        undone = next(row["undone"] for row in result["rows"] if (row["method"], row["budget"]) == ("glowq", "9%"))
        text = (output / "table.md").read_text()
        assert f"glowq at 9% {most:.1%} (measured {undone:.1%})" in text
        assert ("differ by more than 10 points" in text) == any(
            abs(row["predicted"] - row["undone"]) > 0.1 for row in result["rows"] if row["predicted"] is not None
        )

    def test_the_share_of_kl_undone_is_that_of_the_figures(self, compared: tuple[dict[str, Any], Path]) -> None:
        result, _ = compared
        quantized = result["models"][1]["kl"]
        for row in (row for row in result["rows"] if row["kl"] is not None):
            assert row["undone"] == pytest.approx(1 - row["kl"] / quantized)
            assert row["undone_ci95"][0] <= row["undone"] <= row["undone_ci95"][1]

    def test_the_time_line_names_the_stages(self, compared: tuple[dict[str, Any], Path]) -> None:
        stages = compared[0]["timeline"]
        assert {"loading", "gradients", "blocks", "solving", "measuring", "evaluating"} <= set(stages)
        assert all(seconds >= 0 for seconds in stages.values())

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
        command = stored.pop("command")
        assert "--output DIR" in command
        assert str(output.parent) not in command  # folders outside of the working directory are not stored
        assert stored == {
            key: value
            for key, value in result.items()
            if key not in ("command", "output", "timeline", "peak_rss_bytes")
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
        assert "Nothing chosen by svd at 1%" in text

    @pytest.mark.parametrize(("above", "shown"), [(0.9999, False), (1.0009, False), (1.0011, True)])
    def test_a_share_of_hardly_any_gap_is_not_shown(
        self,
        compared: tuple[dict[str, Any], Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        above: float,
        shown: bool,
    ) -> None:
        reference, plain = compared[0]["models"]
        models = [reference, {**plain, "perplexity": above * reference["perplexity"]}]
        rows = [{**row, "recovered": row["perplexity"] and 37.02} for row in compared[0]["rows"]]
        drawn: list[dict[str, Any]] = []

        def draw(file: Path, lines: dict[str, list[dict[str, Any]]], title: str) -> None:
            drawn.extend(row for line in lines.values() for row in line)

        monkeypatch.setattr("glowq.evaluation.plots.draw_recovered", draw)
        result = {**compared[0], "models": models, "rows": rows}
        write_comparison(tmp_path / "out", result, None)
        lines = [line for line in markdown(result).splitlines() if line.startswith("| ")][4:]
        for row, line in zip(rows, lines, strict=True):
            cell = line.split(" | ")[5]
            share = cell.startswith("3702.0%") if shown else cell == "no gap to recover"
            assert cell == "-" if row["perplexity"] is None else share
        assert any(row["recovered"] for row in drawn) is shown
        assert json.loads((tmp_path / "out" / "compare.json").read_text())["rows"] == rows

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
        assert set(contents[0]) == {MANIFEST, "compare.json", "table.md", "bytes.png", "heatmap.png"}
        assert contents[0] == contents[1] == contents[2]

    def test_no_heat_map_without_a_method_that_measures_benefit(self, folder: Path, command: list[Any]) -> None:
        few = ["--methods", "svd", "--budgets", "6%"]
        assert result_of(*command, *few, "--output", folder / "svd")["benefit"] is None
        found = sorted(file.name for file in (folder / "svd").iterdir())
        assert found == ["bytes.png", "compare.json", MANIFEST, "table.md"]

    def test_a_folder_with_other_files_is_left_alone(self, folder: Path, command: list[Any]) -> None:
        done = call(*command, "--output", folder / "model")
        assert done.exit_code == 1
        assert "is not empty" in done.stderr

    def test_a_comparison_is_not_replaced_by_a_correction(self, compared: tuple[dict[str, Any], Path]) -> None:
        with pytest.raises(glowq.GlowQError, match=r"a result of another kind \(comparison, not model\)"):
            check_output(compared[1])

    def test_for_people(self, command: list[Any]) -> None:
        done = call(*command, "--methods", "glowq", "--budgets", "0.00001%,5%")
        assert done.exit_code == 0, done.stderr
        assert "by gain" in done.stdout
        assert "Nothing chosen by glowq at 0.00001%: one rank of the smallest group takes" in done.stdout


@pytest.fixture(scope="module")
def grouped(folder: Path, command: list[Any]) -> tuple[dict[str, Any], Path]:
    """The result of --json and the output folder, for both kinds of GlowQ-S and the methods to compare them with."""
    few = ["--methods", "glowq-s,glowq-s-ratio,glowq-published,glowq", "--budgets", "4%,9%"]
    return result_of(*command, *few, "--output", folder / "groups"), folder / "groups"


class TestWholeGroups:
    def row(self, result: dict[str, Any], method: str, budget: str) -> dict[str, Any]:
        (found,) = [row for row in result["rows"] if (row["method"], row["budget"]) == (method, budget)]
        return found

    @pytest.mark.parametrize("method", ["glowq-s", "glowq-s-ratio"])
    def test_whole_groups_at_a_power_of_two_within_the_bytes(
        self, grouped: tuple[dict[str, Any], Path], method: str
    ) -> None:
        for budget in ("4%", "9%"):
            row = self.row(grouped[0], method, budget)
            assert (row["allocation"], row["same_as"], row["reason"]) == ("groups", None, None)
            assert 0 < row["groups"] <= 8
            assert row["rank"] in (1, 2, 4, 8, 16, 32, 64)
            assert 0 < row["factor_bytes"] <= row["budget_bytes"]

    def test_a_budget_too_small_for_a_whole_group_says_so(self, folder: Path, command: list[Any]) -> None:
        few = ["--methods", "glowq-s", "--budgets", "0.1%,9%"]
        row = result_of(*command, *few)["rows"][0]
        assert (row["groups"], row["rank"], row["perplexity"]) == (0, None, None)
        assert re.fullmatch(
            r"rank 1 of the group of the highest score takes \d+ bytes, more than the budget", row["reason"]
        )

    def test_the_table_says_how_many_groups(self, grouped: tuple[dict[str, Any], Path]) -> None:
        result, output = grouped
        row = self.row(result, "glowq-s", "9%")
        assert f"| {row['rank']} in {row['groups']} groups |" in (output / "table.md").read_text()

    def test_pairs_are_against_glowq(self, grouped: tuple[dict[str, Any], Path]) -> None:
        pairs = {(pair["method"], pair["budget"]) for pair in grouped[0]["pairs"]}
        assert {("glowq-s", "9%"), ("glowq-s-ratio", "9%")} <= pairs


class TestDistilled:
    def test_an_entry_of_the_same_bytes_at_every_budget(self, folder: Path, command: list[Any]) -> None:
        few = ["--methods", "svd,glowq", "--budgets", "0.00001%,4%,9%", "--distill", 2]
        result = result_of(*command, *few, "--output", folder / "distilled")
        rows = {(row["method"], row["budget"]): row for row in result["rows"]}
        assert list(dict.fromkeys(row["method"] for row in result["rows"])) == ["svd", "glowq", "glowq+distilled"]
        for budget in ("4%", "9%"):
            learned, plain = rows["glowq+distilled", budget], rows["glowq", budget]
            assert learned["factor_bytes"] == plain["factor_bytes"] > 0
            assert learned["groups"] == plain["groups"]
            assert learned["same_as"] is None
            assert learned["perplexity"] > 0
        assert rows["glowq+distilled", "0.00001%"]["reason"] == rows["glowq", "0.00001%"]["reason"] is not None
        assert "| glowq+distilled | 9% |" in (folder / "distilled" / "table.md").read_text()
        assert ("glowq+distilled", "9%") in {(pair["method"], pair["budget"]) for pair in result["pairs"]}

    def test_without_a_method_that_allocates_by_gain(self, command: list[Any]) -> None:
        done = call(*command, "--methods", "svd,glowq-s", "--distill", 2)
        assert done.exit_code == 1
        assert "--distill needs a method that allocates by gain: add glowq to --methods" in done.stderr


class TestRounded:
    def test_the_same_bytes_hold_more_ranks(self, command: list[Any]) -> None:
        result = result_of(
            *command, "--methods", "svd,glowq", "--budgets", "0.00001%,9%", "--factor-dtypes", "int8,int3"
        )
        rows = {(row["method"], row["budget"]): row for row in result["rows"]}
        assert list(dict.fromkeys(row["method"] for row in result["rows"])) == [
            "svd",
            "glowq",
            "glowq+int8",
            "glowq+int3",
        ]
        small, plain = rows["glowq+int8", "9%"], rows["glowq", "9%"]
        assert 0 < small["factor_bytes"] <= small["budget_bytes"] == plain["budget_bytes"]
        assert rows["glowq+int3", "9%"]["predicted"] > small["predicted"] > plain["predicted"]
        assert rows["glowq+int8", "0.00001%"]["reason"] is not None

    def test_what_is_refused_says_why(self, command: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(integers._LARGEST, 8, 1)
        monkeypatch.setattr("glowq.factors.integers.LEFT_UNIT", 1.0)
        monkeypatch.setattr("glowq.artifact.correction.check_rounding", lambda *group_gains: None)
        result = result_of(*command, "--methods", "glowq", "--budgets", "9%", "--factor-dtypes", "int8")
        (row,) = (row for row in result["rows"] if row["method"] == "glowq+int8")
        assert "rounding loses more than the saved bytes gain" in row["reason"]

    def test_without_a_method_that_allocates_by_gain(self, command: list[Any]) -> None:
        done = call(*command, "--methods", "svd,glowq-s", "--factor-dtypes", "int4")
        assert done.exit_code == 1
        assert "--factor-dtypes needs a method that allocates by gain: add glowq to --methods" in done.stderr


@pytest.fixture(scope="module")
def instead(folder: Path, command: list[Any]) -> dict[str, Any]:
    """The result with --alternatives, whose files are in instead/."""
    asked = ["--methods", "svd,glowq", "--budgets", "9%,60%", "--alternatives", "--output", folder / "instead"]
    return result_of(*command, *asked)


class TestAlternatives:
    def test_rows_follow_those_of_the_methods(self, instead: dict[str, Any]) -> None:
        result = instead
        rows = [(row["method"], row["budget"]) for row in result["rows"]]
        assert rows[4:] == [("finer", ""), ("wider", ""), ("mixed", "9%"), ("mixed", "60%")]
        assert all(set(row) == {*result["rows"][0], "settings", "widened"} for row in result["rows"][4:])
        finer, wider, _, mixed = result["rows"][4:]
        assert "the block of bitsandbytes" in finer["reason"]
        assert finer["perplexity"] is None
        assert wider["settings"] == "int8, one scale a row"
        assert 0 < mixed["factor_bytes"] <= mixed["budget_bytes"]
        assert mixed["overhead"] == mixed["factor_bytes"] / result["base_bytes"]
        assert mixed["groups"] == len(mixed["widened"]) > 0
        assert ("mixed", "60%") in {(pair["method"], pair["budget"]) for pair in result["pairs"]}

    def test_table(self, instead: dict[str, Any], folder: Path) -> None:
        text = (folder / "instead" / "table.md").read_text()
        wider, *_, mixed = instead["rows"][5:]
        assert f"| wider |  | {wider['factor_bytes']:,} (+{wider['overhead']:.2%}) | int8, one scale a row |" in text
        assert f"| mixed | 60% | {mixed['factor_bytes']:,} (+{mixed['overhead']:.2%}) | {mixed['settings']} |" in text
        assert "Nothing chosen by finer: transformers has no setting" in text
        assert "are no corrections but other settings of the base's library" in text

    def test_a_model_that_is_quantized_already_has_none(self, command: list[Any]) -> None:
        done = call(*command[:2], *command[4:], "--alternatives")
        assert done.exit_code == 1
        assert "--alternatives quantizes with other settings of a --base" in done.stderr


class TestCloze:
    def test_every_model_answers_the_same_items(self, folder: Path, command: list[Any]) -> None:
        few = ["--methods", "svd,glowq", "--budgets", "9%", "--sequence-length", 96, "--cloze", 8]
        result = result_of(*command, *few, "--output", folder / "cloze")
        cloze = result["cloze"]
        assert (cloze["items"], cloze["over"]) == (8, "quantized")
        assert list(cloze["models"]) == ["reference", "quantized", "svd at 9%", "glowq at 9%"]
        plain = cloze["models"]["quantized"]
        assert (plain["gain"], plain["gain_ci95"]) == (None, None)
        for name, found in cloze["models"].items():
            assert found["accuracy"] * 8 == int(found["accuracy"] * 8)
            assert found["accuracy_ci95"][0] <= found["accuracy"] <= found["accuracy_ci95"][1]
            if name != "quantized":
                assert found["gain"] == found["accuracy"] - plain["accuracy"]
                assert found["gain_ci95"][0] <= found["gain"] <= found["gain_ci95"][1]
        table = (folder / "cloze" / "table.md").read_text()
        assert "Cloze, 8 items, share answered right (chance: 25%), gain over quantized:" in table
        assert re.search(r"^- glowq at 9%: [\d.]+% \[.*\]; [+-][\d.]+ \[.*\] points\.", table, re.MULTILINE)

    def test_more_items_than_passages_are_refused_before_the_work(self, folder: Path, command: list[Any]) -> None:
        done = call(*command, "--sequence-length", 96, "--cloze", 11, "--output", folder / "never")
        assert done.exit_code == 1
        assert "11 cloze items need 11 passages of 80 tokens, found 10 in 10 sequences of 96 tokens" in done.stderr
        assert not (folder / "never").exists()


def test_a_gguf_file(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    writers.gguf(small_model(), tmp_path / "model-Q4_0.gguf", "Q4_0")
    texts = ["--calibration", folder / "train.txt", "--data", folder / "test.txt"]
    command = ["compare", tmp_path, "--base", "dense", "--reference", small_model(), *texts, *SIZES]
    few = ["--methods", "svd,glowq", "--budgets", "6%"]
    result = result_of(*command, *few, "--gguf-file", "model-Q4_0.gguf")
    _, plain = result["models"]
    assert all(0 < row["kl"] < plain["kl"] for row in result["rows"])
    assert all(0 < row["factor_bytes"] <= row["budget_bytes"] for row in result["rows"])
    without = call(*command, *few)
    assert without.exit_code == 1
    assert "--gguf-file model-Q4_0.gguf" in without.stderr


class TestRefused:
    def test_text_that_was_calibrated_on_and_can_be_forced(self, folder: Path, command: list[Any]) -> None:
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

    def test_unknown_method(self, command: list[Any]) -> None:
        done = call(*command, "--methods", "svd,best")
        assert done.exit_code == 2
        assert "method must be one of aser, " in done.stderr

    @pytest.mark.parametrize("option", ["--methods", "--tasks", "--budgets"])
    def test_an_empty_list_is_wrong_usage(self, command: list[Any], option: str) -> None:
        assert call(*command, option, " ,").exit_code == 2

    @pytest.mark.parametrize("budgets", ["1%,much", "0%"])
    def test_budgets_that_are_none_are_wrong_usage(self, command: list[Any], budgets: str) -> None:
        assert call(*command, "--budgets", budgets).exit_code == 2

    def test_without_matplotlib(self, folder: Path, command: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("glowq.evaluation.plots.find_spec", lambda name: None)
        done = call(*command, "--output", folder / "never")
        assert done.exit_code == 1
        assert "pip install 'glowq[plot]'" in done.stderr
        assert not (folder / "never").exists()
        assert call(*command, "--methods", "svd", "--budgets", "6%").exit_code == 0

    def test_without_the_harness(self, command: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("glowq.integrations.lm_eval.find_spec", lambda name: None)
        done = call(*command, "--tasks", "arc_easy")
        assert done.exit_code == 1
        assert "pip install lm_eval" in done.stderr
