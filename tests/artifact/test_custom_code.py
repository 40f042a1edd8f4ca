"""Models whose class is in a file beside their weights: the correction takes the file along, and nobody runs it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import glowq
from glowq.artifact.hub.contents import read_result
from glowq.errors import ConfigError, ModelNotFoundError
from support.tiny import CALIBRATION, CHEAP, TEXTS, gap, logits, tiny_llama

CODE = {
    "configuration_mine.py": "from transformers import LlamaConfig\n\n\nclass MineConfig(LlamaConfig):\n"
    '    model_type = "mine"\n',
    "modeling_mine.py": "from transformers import LlamaForCausalLM\n\nfrom .configuration_mine import MineConfig\n"
    "from .scaling import SCALE\n\n\nclass MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n"
    "    scale = SCALE\n",
    "scaling.py": "SCALE = 2\n",
}
AUTO_MAP = {"AutoConfig": "configuration_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_llama(tmp_path_factory.mktemp("custom") / "source", num_hidden_layers=1)
    for name, text in CODE.items():
        (folder / name).write_text(text)
    config = {**json.loads((folder / "config.json").read_text()), "model_type": "mine", "auto_map": AUTO_MAP}
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["MineForCausalLM"]}))
    return folder


@pytest.fixture(scope="module")
def saved(source: Path) -> tuple[Any, Path]:
    """A corrected model of this class, and the folder of its two forms."""
    model = loaded(source, quantization_config=glowq.GlowQConfig(base="nf4").base)
    tokenizer = AutoTokenizer.from_pretrained(source)
    options = {"calibration": TEXTS, "rank": 4, **CHEAP, **CALIBRATION}
    glowq.correct(model, reference=source, tokenizer=tokenizer, **options).save_pretrained(source.parent / "correction")
    model.save_pretrained(source.parent / "full")
    return model, source.parent


def loaded(folder: Path | str, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


@pytest.mark.parametrize("form", ["correction", "full"])
def test_both_forms_load_without_the_base_folders_code(saved: Any, form: str, source: Path, tmp_path: Path) -> None:
    model, folder = saved
    for name in CODE:
        assert (folder / form / name).read_text() == CODE[name]
    assert type(loaded(folder / form)).__name__ == "MineForCausalLM"
    assert gap(loaded(folder / form), logits(model)) == 0.0
    assert set(CODE) <= set(read_result(folder / form).files)  # what `push` uploads


def test_code_runs_only_for_who_trusts_it(saved: Any) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(saved[1] / "correction", trust_remote_code=False)


def test_a_selected_part_takes_the_code_along(saved: Any, tmp_path: Path) -> None:
    model, folder = saved
    glowq.Correction.from_pretrained(folder / "correction", rank=2).save_pretrained(tmp_path / "part")
    assert {name: (tmp_path / "part" / name).read_text() for name in CODE} == CODE
    assert gap(loaded(tmp_path / "part"), logits(model)) > 0


def test_code_that_is_missing_is_named_before_anything_is_pushed(saved: Any, tmp_path: Path) -> None:
    shutil.copytree(saved[1] / "correction", tmp_path / "copy")
    (tmp_path / "copy" / "modeling_mine.py").unlink()
    for read in (read_result, glowq.Correction.from_pretrained):
        with pytest.raises(ModelNotFoundError, match=r"modeling_mine\.py is missing: config\.json or another file"):
            read(tmp_path / "copy")


def test_a_strangers_code_reads_nothing_outside_of_its_folder(saved: Any, tmp_path: Path) -> None:
    shutil.copytree(saved[1] / "correction", tmp_path / "copy")
    (tmp_path / "secret.py").write_text("KEY = 1\n")
    (tmp_path / "copy" / "modeling_mine.py").write_text("from .x/../../secret import KEY\nfrom ..secret import KEY\n")
    assert set(glowq.Correction.from_pretrained(tmp_path / "copy").code) == {
        "configuration_mine.py",
        "modeling_mine.py",
    }
    config = tmp_path / "copy" / "config.json"
    stored = json.loads(config.read_text())
    config.write_text(json.dumps({**stored, "auto_map": {"AutoConfig": "../secret.Config"}}))
    assert glowq.Correction.from_pretrained(tmp_path / "copy").code == {}
    config.write_text(json.dumps({**stored, "auto_map": ["x"]}))
    with pytest.raises(ConfigError, match=r"auto_map in .* must be a JSON object of names"):
        glowq.Correction.from_pretrained(tmp_path / "copy")


def test_code_of_the_hub_is_named_by_its_repository(saved: Any, tmp_path: Path, hub: Any) -> None:
    hub("me/mine", saved[1] / "correction")
    part = glowq.Correction.from_pretrained("me/mine", rank=2)
    assert part.code == {}
    assert part.model_config["auto_map"] == {name: f"me/mine--{entry}" for name, entry in AUTO_MAP.items()}
