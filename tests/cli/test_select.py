"""`glowq select` writes the same correction as `Correction.cut`, and writes nothing for a bad budget."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import glowq
from support.cli import call, result_of
from support.corrections import changed
from support.tiny import corrected, gap, load, logits, tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("select")


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """A rank-8 correction with held-out figures, as `glowq correct` records them."""
    _, correction = corrected(tiny_llama(folder / "model"), "nf4", rank=8)
    figures = {"reference": 9.0, "quantized": 9.5, "corrected": 9.2, "recovered": 0.6, "tokens": 512}
    correction.config.record(command="glowq correct model --output OUT", held_out=figures)
    correction.save_pretrained(folder / "whole")
    return folder / "whole"


def provenance_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["provenance"]


@pytest.fixture(scope="module")
def selected(whole: Path, folder: Path) -> tuple[dict[str, Any], Path]:
    """The result of --json and the output folder, for a cut to 3%."""
    return result_of("select", whole, "--budget", "3%", "--output", folder / "cut"), folder / "cut"


class TestWhatIsWritten:
    def test_factors_are_those_of_cut(self, whole: Path, selected: tuple[dict[str, Any], Path]) -> None:
        expected = glowq.Correction.from_pretrained(whole).cut(budget="3%").tensors()
        found = load_file(selected[1] / "glowq.safetensors")
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    def test_figures(self, whole: Path, selected: tuple[dict[str, Any], Path]) -> None:
        result, folder = selected
        before, after = (glowq.Correction.from_pretrained(path) for path in (whole, folder))
        assert result["factor_bytes"] == after.factor_bytes <= 0.03 * after.base_bytes
        assert result["of_factor_bytes"] == before.factor_bytes > result["factor_bytes"]
        assert result["ranks"] == after.ranks
        assert result["overhead"] == after.overhead
        kept, had = (sum(float(entry.gains.sum()) for entry in side.factors) for side in (after, before))
        assert result["gain_kept"] == pytest.approx(kept / had)
        assert result["predicted"] == pytest.approx(kept / before.config.total)
        assert provenance_of(folder)["total"] == provenance_of(whole)["total"] == before.config.total
        assert result["note"] is None
        assert result["command"].endswith("--json")

    def test_it_loads_as_a_model(self, folder: Path, selected: tuple[dict[str, Any], Path]) -> None:
        model, _ = corrected(folder / "model", "nf4", rank=8)
        glowq.detach(model)
        glowq.load_correction(model, folder / "whole", budget="3%")
        assert gap(load(selected[1]), logits(model)) == 0

    def test_provenance_names_both_commands_and_no_figure_of_the_whole(
        self, whole: Path, selected: tuple[dict[str, Any], Path]
    ) -> None:
        stored = provenance_of(selected[1])
        made, cut = stored["command"].splitlines()
        assert made == "glowq correct model --output OUT"
        assert re.fullmatch(r"glowq select \S+ --budget 3% --output OUT2 --json", cut)
        assert "held_out" not in stored
        assert stored["selected"]["budget"] == "3%"
        assert stored["selected"]["of_held_out"] == provenance_of(whole)["held_out"]
        assert "Measured" not in (selected[1] / "README.md").read_text()

    def test_same_command_gives_the_same_bytes_and_replaces_its_result(self, whole: Path, folder: Path) -> None:
        contents = []
        for name in ("first", "second", "first"):
            assert call("select", whole, "--budget", "2%", "--output", folder / name).exit_code == 0
            contents.append({file.name: file.read_bytes() for file in (folder / name).iterdir()})
        assert contents[0] == contents[1] == contents[2]

    def test_the_whole_of_it_may_be_asked_for(self, whole: Path, folder: Path) -> None:
        size = glowq.Correction.from_pretrained(whole).factor_bytes
        assert result_of("select", whole, "--budget", size, "--output", folder / "all")["factor_bytes"] == size

    def test_a_target_in_steps(self, whole: Path, folder: Path) -> None:
        options = ["--budget", "recover 40%", "--rank-step", 4]
        result = result_of("select", whole, *options, "--output", folder / "target")
        assert 0.4 <= result["predicted"] <= 0.6
        assert set(result["ranks"].values()) <= {4, 8}
        capped = result_of("select", whole, *options, "--max-rank", 4, "--output", folder / "capped")
        assert set(capped["ranks"].values()) == {4}
        assert len(capped["ranks"]) >= len(result["ranks"])
        assert (capped["budget"], capped["rank_step"], capped["max_rank"]) == ("recover 40%", 4, 4)
        assert provenance_of(folder / "capped")["command"].endswith("--output OUT2 --json")

    def test_for_people(self, whole: Path, folder: Path) -> None:
        done = call("select", whole, "--budget", "2%", "--output", folder / "shown")
        assert done.exit_code == 0
        assert re.search(r"predicted gain kept +\d", done.stdout)
        assert done.stderr == ""


class TestRefused:
    def refused(self, folder: Path, *arguments: Any) -> str:
        done = call("select", *arguments, "--output", folder / "never")
        assert done.exit_code == 1
        assert not (folder / "never").exists()
        assert re.fullmatch(r"glowq: error: [^\n]*\n", done.stderr)
        return done.stderr

    def test_budget_above_the_whole(self, whole: Path, folder: Path) -> None:
        size = glowq.Correction.from_pretrained(whole).factor_bytes
        assert f"has only {size} (" in self.refused(folder, whole, "--budget", "90%")

    def test_budget_below_one_rank(self, whole: Path, folder: Path) -> None:
        assert "one rank of the smallest group takes" in self.refused(folder, whole, "--budget", "1B")

    def test_a_step_that_no_group_holds(self, whole: Path, folder: Path) -> None:
        message = self.refused(folder, whole, "--budget", "5%", "--rank-step", 16)
        assert "no group holds the 16 ranks of one rank_step (the largest has 8)" in message

    def test_a_target_out_of_reach(self, whole: Path, folder: Path) -> None:
        message = self.refused(folder, whole, "--budget", "recover 99.9%")
        assert re.search(
            r"recover at most a predicted \d+\.\d% of the loss\. .* larger .* \(--budget, --rank\)", message
        )

    @pytest.mark.parametrize("options", [["--rank-step", "0"], ["--max-rank", "0"], ["--rank-step=9", "--max-rank=8"]])
    def test_limits_that_are_none_are_wrong_usage(self, whole: Path, folder: Path, options: list[str]) -> None:
        assert call("select", whole, "--budget=1%", *options, "--output", folder / "never").exit_code == 2

    @pytest.mark.parametrize("budget", ["much", "0%", "-1%", "", "recover", "recover 100%"])
    def test_a_budget_that_is_none_is_wrong_usage(self, whole: Path, folder: Path, budget: str) -> None:
        assert call("select", whole, f"--budget={budget}", "--output", folder / "never").exit_code == 2

    def test_a_model_that_is_no_correction(self, folder: Path, whole: Path) -> None:
        assert "names no glowq correction" in self.refused(folder, folder / "model", "--budget", "1%")

    def test_a_missing_folder(self, folder: Path) -> None:
        assert "neither a folder nor" in self.refused(folder, folder / "nothing", "--budget", "1%")

    def test_itself_as_output(self, whole: Path) -> None:
        before = (whole / "glowq.safetensors").read_bytes()
        done = call("select", whole, "--budget", "1%", "--output", whole)
        assert done.exit_code == 1
        assert "is the correction itself" in done.stderr
        assert (whole / "glowq.safetensors").read_bytes() == before

    def test_gains_that_were_never_measured(self, whole: Path, folder: Path) -> None:
        def remove_gains(stored: dict[str, Any]) -> None:
            for group in stored["groups"].values():
                group["gains"] = [0.0] * group["rank"]

        unmeasured = changed(whole, folder / "unmeasured", remove_gains)
        assert "holds no measured gains" in self.refused(folder, unmeasured, "--budget", "1%")


def test_gains_in_output_units_are_selected_by_with_a_note(whole: Path, folder: Path) -> None:
    other = changed(whole, folder / "one-sided", lambda stored: stored["provenance"].update(gains="squared output"))
    done = call("select", other, "--budget", "2%", "--output", folder / "noted", "--json")
    assert done.exit_code == 0
    assert done.stderr.startswith("glowq: note: the gains in ")
    assert "--method glowq" in json.loads(done.stdout)["note"]


def test_a_part_of_a_distilled_correction_is_said_to_be_unmeasured(whole: Path, folder: Path) -> None:
    distilled = changed(whole, folder / "distilled", lambda stored: stored["provenance"].update(distilled_steps=60))
    done = call("select", distilled, "--budget", "2%", "--output", folder / "part", "--json")
    assert done.exit_code == 0
    assert "was distilled at the ranks that it has" in done.stderr
