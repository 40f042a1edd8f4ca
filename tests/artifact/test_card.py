"""The model card: its metadata for the Hub, its text for people, and its picture."""

from __future__ import annotations

import copy
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import glowq
from glowq.artifact.card import CARD, PICTURE, base_license, card_files

FIGURES = {"reference": 10.0, "quantized": 12.0, "corrected": 10.8, "recovered": 0.6, "recovered_ci95": [0.5, 0.7]}
PERPLEXITIES = [("full precision", 10.0), ("quantized", 12.0), ("corrected", 10.8)]


@pytest.fixture
def correction(rank_8: Path) -> glowq.Correction:
    """A correction with held-out figures, as `glowq correct` records them."""
    found = glowq.Correction.from_pretrained(rank_8)
    found.config.record(held_out={**FIGURES, "tokens": 4096}, command="glowq correct model --base nf4")
    return found


def card_of(correction: glowq.Correction) -> ModelCard:
    return ModelCard(correction.model_card())


class TestMetadata:
    def test_measured_figures_are_its_model_index(self, correction: glowq.Correction, tmp_path: Path) -> None:
        correction.save_pretrained(tmp_path)
        data = ModelCard.load(tmp_path / CARD).data
        found = [(result.metric_type, result.metric_name, result.metric_value) for result in data.eval_results or []]
        expected = [("perplexity", f"Perplexity, {name}", value) for name, value in PERPLEXITIES]
        assert found == [*expected, ("recovered", "Share of the perplexity gap recovered", 0.6)]
        assert {result.task_type for result in data.eval_results or []} == {"text-generation"}
        assert (data.library_name, data.pipeline_tag) == ("glowq", "text-generation")
        assert data.tags == ["glowq", "quantized", "low-rank-correction"]

    @pytest.mark.parametrize("changes", [{"recovered_ci95": None}, {"quantized": 10.001}, {"recovered": None}], ids=str)
    def test_a_share_that_says_nothing_is_left_out(self, correction: glowq.Correction, changes: dict[str, Any]) -> None:
        correction.config.provenance.held_out.update(changes)
        assert {result.metric_type for result in card_of(correction).data.eval_results or []} == {"perplexity"}

    def test_nothing_measured(self, correction: glowq.Correction) -> None:
        correction.config.record(held_out=None)
        data = card_of(correction).data.to_dict()
        assert not {"model-index", "model_name", "pipeline_tag"} & set(data)
        assert "What it recovers was not evaluated" in correction.model_card()

    def test_a_base_on_the_hub_is_named_and_a_folder_of_this_machine_is_not(
        self, correction: glowq.Correction, source: Path
    ) -> None:
        assert "base_model" not in card_of(correction).data.to_dict()
        assert str(source.parent) not in correction.model_card()
        assert correction.config.base_model is not None
        correction.config.base_model.update(name="org/base", revision="abc")
        card = card_of(correction)
        assert (card.data.base_model, card.data.to_dict()["base_model_relation"]) == ("org/base", "quantized")
        assert "`org/base` at revision `abc`" in card.text


class TestLicense:
    @pytest.fixture
    def base(self, correction: glowq.Correction, source: Path, tmp_path: Path) -> Path:
        """A copy of the base model; the correction refers to it."""
        shutil.copytree(source, tmp_path / "base")
        assert correction.config.base_model is not None
        correction.config.base_model["name"] = str(tmp_path / "base")
        return tmp_path / "base"

    def test_of_the_base_s_card(self, correction: glowq.Correction, base: Path) -> None:
        (base / CARD).write_text("---\nlicense: other\nlicense_name: gemma\nlanguage: en\n---\n")
        data = card_of(correction).data.to_dict()
        assert (data["license"], data["license_name"]) == ("other", "gemma")
        assert "language" not in data

    def test_of_the_base_s_config(self, correction: glowq.Correction, base: Path) -> None:
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "license": "mit"}))
        assert card_of(correction).data.license == "mit"

    @pytest.mark.parametrize("text", ["---\nlicense: [\n---\n", "---\n- mit\n---\n", "no metadata", "\udcff"], ids=repr)
    def test_none_of_a_card_that_states_none(self, correction: glowq.Correction, base: Path, text: str) -> None:
        (base / CARD).write_bytes(text.encode(errors="surrogateescape"))
        assert "license" not in card_of(correction).data.to_dict()

    def test_of_a_base_in_the_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        snapshot = tmp_path / "models--org--base" / "snapshots" / ("a" * 40)
        snapshot.mkdir(parents=True)
        (snapshot / CARD).write_text("---\nlicense: mit\n---\n")
        assert base_license({"name": "org/base", "revision": "a" * 40}) == {"license": "mit"}
        assert base_license({"name": "org/base", "revision": "b" * 40}) == {}


class TestPicture:
    def test_the_same_correction_gives_the_same_one(self, correction: glowq.Correction, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        for name in ("first", "again", "first"):
            correction.save_pretrained(tmp_path / name)
        first, again = ((tmp_path / name / PICTURE).read_bytes() for name in ("first", "again"))
        assert first == again
        assert first.startswith(b"\x89PNG")
        assert f"]({PICTURE})" in (tmp_path / "first" / CARD).read_text()

    def test_without_matplotlib_there_is_the_table(
        self, correction: glowq.Correction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        correction.save_pretrained(tmp_path)
        text = (tmp_path / CARD).read_text()
        assert not (tmp_path / PICTURE).exists()
        assert PICTURE not in text
        assert "| bytes | of the quantized weights | predicted share recovered |" in text

    def test_every_row_is_what_a_cut_keeps(self, correction: glowq.Correction) -> None:
        rows = re.findall(r"^\| ([\d,]+) \| \S+ \| ([\d.]+%) \|$", correction.model_card(), re.MULTILINE)
        assert len(rows) > 5
        for size, share in rows:
            assert share == f"{correction.cut(budget=int(size.replace(',', ''))).predicted:.1%}"
        assert int(rows[-1][0].replace(",", "")) == correction.factor_bytes

    @pytest.mark.parametrize("change", [{"distilled_steps": 60}, {"total": 0}], ids=str)
    def test_nothing_is_predicted_of_what_was_distilled_or_never_measured(
        self, correction: glowq.Correction, change: dict[str, Any]
    ) -> None:
        correction.config.record(**change)
        files = card_files(correction.config, correction.group_gains)
        assert set(files) == {CARD}
        assert b"Predicted for fewer bytes" not in files[CARD]
        assert (b"Do not cut it" in files[CARD]) is ("distilled_steps" in change)


class TestText:
    def test_measured(self, correction: glowq.Correction) -> None:
        text = correction.model_card()
        assert "| 10.0000 | 12.0000 | 10.8000 | 60.0% [50.0%, 70.0%] |" in text
        assert "on 4,096 tokens held out" in text
        assert "\nglowq correct model --base nf4\n" in text
        assert "not other text, not tasks, not speed" in text

    def test_a_part_says_that_the_figures_were_of_the_whole(self, correction: glowq.Correction) -> None:
        text = correction.cut(rank=4).model_card()
        assert f"cut from a correction of {correction.factor_bytes} bytes, whose figures are not its own" in text
        assert "60.0% [50.0%, 70.0%]" not in text

    def test_of_a_model_in_one_piece(self, correction: glowq.Correction) -> None:
        whole = copy.copy(correction)
        whole.config = correction.config.with_format("full")
        text = whole.model_card()
        assert "quantized by bitsandbytes and corrected by glowq" in text
        assert "The base model is loaded by its name" not in text
        assert "The base model is loaded by its name" in correction.model_card()

    def test_no_blank_line_is_doubled(self, correction: glowq.Correction) -> None:
        for form in ("correction", "full"):
            correction.config = correction.config.with_format(form)
            assert "\n\n\n" not in correction.model_card()
