"""Corrections with factors of few bits: the loss by rounding, when it is refused, files, commands and exports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import glowq
from glowq.cli.app import app
from glowq.errors import CalibrationError, ConfigError, CorrectionError, RoundingError
from glowq.factors import integers
from glowq.factors.integers import pack, unpack
from glowq.integrations.export.registry import export
from glowq.runtime.attach import attached, attached_factors
from support import tiny


@pytest.fixture(scope="module", params=["int8", "int4", "int3"])
def dtype(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def bits(dtype: str) -> int:
    return int(dtype.removeprefix("int"))


@pytest.fixture(scope="module")
def corrected(source: Path, dtype: str) -> tuple[Any, glowq.Correction]:
    return tiny.corrected(source, "nf4", rank=None, budget="12%", factor_dtype=dtype)


@pytest.fixture(scope="module")
def saved(corrected: tuple[Any, glowq.Correction], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a rounded correction. Tests do not change it."""
    folder = tmp_path_factory.mktemp("rounded") / "correction"
    corrected[1].save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an unrounded correction with measured gains. Tests do not change it."""
    folder = tmp_path_factory.mktemp("whole") / "correction"
    tiny.corrected(source, "nf4", rank=16)[1].save_pretrained(folder)
    return folder


class TestCorrecting:
    def test_a_budget_counts_the_bits_of_each_value(
        self, source: Path, corrected: tuple[Any, glowq.Correction], dtype: str, bits: int
    ) -> None:
        correction = corrected[1]
        assert 0.09 < correction.overhead <= 0.12
        assert {entry.bits for entry in correction.factors} == {bits}
        assert f"{correction.factor_bytes} bytes of {dtype}" in repr(correction)
        for entry in correction.factors:
            widths = entry.group.in_features, *entry.group.out_features
            values = sum(widths) if bits == 8 else sum(-(-width // 32) * (4 * bits + 1) for width in widths)
            assert entry.factor_bytes == entry.rank * (values + 4)
        unrounded = tiny.corrected(source, "nf4", rank=None, budget="12%", factor_dtype="float")[1]
        assert sum(correction.ranks.values()) > 1.7 * sum(unrounded.ranks.values())

    def test_what_rounding_costs_was_measured(self, corrected: tuple[Any, glowq.Correction], bits: int) -> None:
        figures = corrected[1].config.provenance.rounding
        assert set(figures) == {"tokens", "quantized", "rounded", "same_ranks", "same_bytes"}
        gained = figures["quantized"] - figures["same_ranks"]
        assert figures["rounded"] <= figures["same_bytes"] + 0.01 * gained
        assert abs(figures["rounded"] - figures["same_ranks"]) < {8: 0.05, 4: 0.1, 3: 0.2}[bits] * gained

    def test_what_is_read_back_has_the_models_dtype(self, source: Path, corrected: tuple[Any, Any]) -> None:
        """The factors have the dtype of the model even if the scales are float32, as on a GPU."""
        model, correction = corrected
        first = next(iter(attached(model).values()))
        first.right.scale = first.right.scale.float()
        try:
            entry = attached_factors(model)[0]
        finally:
            first.right.scale = first.right.scale.bfloat16()
        assert {entry.right.dtype, *(left.dtype for left in entry.lefts.values())} == {torch.bfloat16}
        assert torch.equal(entry.right, correction.factors[0].right)

    @pytest.mark.parametrize("options", [{"method": "qera"}, {"distill": 2}, {"rank": 4, "budget": None}])
    def test_every_way_of_correcting(self, source: Path, options: dict[str, Any], dtype: str, bits: int) -> None:
        request = {"rank": 4} if "method" in options else {"rank": None, "budget": "12%"}
        model, correction = tiny.corrected(source, "nf4", **{**request, **options}, factor_dtype=dtype)
        assert {container.bits for container in attached(model).values()} == {bits}
        for entry in correction.factors:
            packed = pack(entry.right, entry.lefts, bits)
            assert torch.equal(unpack(packed, entry.right.dtype, entry.group.shapes)[0], entry.right)

    def test_while_loading(self, source: Path, dtype: str, bits: int) -> None:
        config = glowq.GlowQConfig(base="nf4", calibration=tiny.TEXTS, rank=4, factor_dtype=dtype, **tiny.CALIBRATION)
        model = tiny.load(source, quantization_config=config)
        assert {container.bits for container in attached(model).values()} == {bits}

    def test_one_sequence_is_none_to_measure_on(self, source: Path) -> None:
        ids = torch.randint(0, 4096, (1, 64))
        with pytest.raises(CalibrationError, match=r"int8 .*: needed 2 sequences to hold one out, found 1"):
            tiny.corrected(source, "nf4", calibration=ids, factor_dtype="int8")

    def test_what_loses_more_than_it_wins_is_refused(self, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Rounding to 1 step instead of 127 steps destroys most of a factor, so it is refused."""
        monkeypatch.setitem(integers._LARGEST, 8, 1)
        monkeypatch.setattr("glowq.factors.integers.LEFT_UNIT", 1.0)
        monkeypatch.setattr("glowq.artifact.correction.check_rounding", lambda *group_gains: None)
        message = (
            r"int8 factors leave \d.*the factors were not calibrated on\), and unrounded ones in the same bytes \d"
        )
        with pytest.raises(RoundingError, match=message):
            tiny.corrected(source, "nf4", rank=None, budget="40%", factor_dtype="int8")


def test_what_is_predicted_to_lose_more_than_it_wins_is_refused(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(integers._LARGEST, 8, 1)
    monkeypatch.setattr("glowq.factors.integers.LEFT_UNIT", 1.0)
    correction = glowq.Correction.from_pretrained(whole)
    message = r"predicted to keep [\d.]+% of what these factors gain, and unrounded ones cut to the same [\d,]+ bytes"
    with pytest.raises(RoundingError, match=message):
        correction.rounded("int8")


class TestFiles:
    def test_the_bytes_on_disk(self, saved: Path, corrected: tuple[Any, glowq.Correction], bits: int) -> None:
        tensors = load_file(saved / "glowq.safetensors")
        kinds = {name.rpartition(".")[2]: tensor.dtype for name, tensor in tensors.items()}
        codes = torch.int8 if bits == 8 else torch.uint8
        multipliers = {} if bits == 8 else {"right_multipliers": torch.int8, "left_multipliers": torch.int8}
        assert kinds == {"right": codes, "left": codes, "right_scale": torch.float32, **multipliers}
        stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        assert stored == corrected[1].factor_bytes

    def test_loading_changes_no_logit(
        self, saved: Path, corrected: tuple[Any, glowq.Correction], source: Path, tmp_path: Path, bits: int
    ) -> None:
        model, _ = corrected
        expected = tiny.logits(model)
        assert tiny.gap(tiny.load(saved), expected) == 0.0
        attached_later = tiny.quantized(source, "nf4")
        glowq.load_correction(attached_later, saved)
        assert tiny.gap(attached_later, expected) == 0.0
        model.save_pretrained(tmp_path / "full")
        full = tiny.load(tmp_path / "full")
        assert {container.bits for container in attached(full).values()} == {bits}
        assert tiny.gap(full, expected) == 0.0

    def test_a_part_of_it(self, saved: Path, source: Path) -> None:
        model = tiny.quantized(source, "nf4")
        part = glowq.load_correction(model, saved, budget="4%")
        assert part.overhead <= 0.04
        cut = glowq.Correction.from_pretrained(saved).cut(budget="4%")
        assert cut.ranks == part.ranks
        for ours, theirs in zip(cut.factors, part.factors, strict=True):
            assert torch.equal(ours.right, theirs.right)
            assert all(torch.equal(ours.lefts[member], left) for member, left in theirs.lefts.items())

    def test_the_same_command_gives_the_same_bytes(self, saved: Path, source: Path, tmp_path: Path, dtype: str) -> None:
        again = tiny.corrected(source, "nf4", rank=None, budget="12%", factor_dtype=dtype)[1]
        again.save_pretrained(tmp_path / "again")
        for name in ("glowq.safetensors", "config.json", "README.md"):
            assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda t, g: t.update({f"{g}.right_scale": t[f"{g}.right_scale"] * 1.5}), "no power of two"),
            (lambda t, g: t.update({f"{g}.right_scale": -t[f"{g}.right_scale"]}), "no power of two"),
            (lambda t, g: t.update({f"{g}.right_scale": t[f"{g}.right_scale"].half()}), "dtype F16, expected F32"),
            (lambda t, g: t.update({f"{g}.right_scale": t[f"{g}.right_scale"][:-1]}), "expected F32 of shape"),
            (lambda t, g: t.pop(f"{g}.right_scale"), "right_scale' is missing"),
            (
                lambda t, g: t.update({f"{g}.right": t[f"{g}.right"].float()}),
                "expected BF16 or F16 or F32 or F64 of shape",
            ),
            (lambda t, g: t.update({f"{g}.right": t[f"{g}.right"].short()}), "expected BF16 or F16 or F32 or F64"),
        ],
    )
    def test_damaged_files(self, saved: Path, tmp_path: Path, damage: Any, message: str) -> None:
        for file in saved.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        tensors = load_file(tmp_path / "glowq.safetensors")
        damage(tensors, next(name for name in tensors if name.endswith(".right")).removesuffix(".right"))
        save_file(tensors, tmp_path / "glowq.safetensors", metadata={"format": "pt"})
        config = json.loads((tmp_path / "config.json").read_text())
        for group in config["quantization_config"]["groups"].values():
            del group["sha256"]  # as in files of glowq 0.1: a checksum would find any damage
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CorrectionError, match=message):
            tiny.load(tmp_path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.fill_(127), "holds numbers above 127"),
            (lambda t: t.resize_(t.shape[0], t.shape[1] - 1), "expected I8 of shape"),
            (None, "multipliers' is missing"),
        ],
    )
    def test_damaged_multipliers(self, source: Path, tmp_path: Path, change: Any, message: str) -> None:
        tiny.corrected(source, "nf4", rank=4, factor_dtype="int4")[1].save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "glowq.safetensors")
        name = next(name for name in tensors if name.endswith("multipliers"))
        change(tensors[name]) if change else tensors.pop(name)
        save_file(tensors, tmp_path / "glowq.safetensors", metadata={"format": "pt"})
        config = json.loads((tmp_path / "config.json").read_text())
        for group in config["quantization_config"]["groups"].values():
            del group["sha256"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CorrectionError, match=message):
            tiny.load(tmp_path)


def run(*arguments: Any) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    return result.exit_code, json.loads(result.stdout) if result.exit_code == 0 else {}


class TestCommands:
    @pytest.mark.parametrize("name", ["int8", "int4", "int3"])
    def test_select_rounds_a_saved_correction(self, whole: Path, tmp_path: Path, name: str) -> None:
        status, plain = run("select", whole, "--budget", "4%", "--output", tmp_path / "plain")
        assert status == 0
        status, found = run("select", whole, "--budget", "4%", "--factor-dtype", name, "--output", tmp_path / "small")
        assert status == 0
        assert found["factor_dtype"] == name
        assert plain["factor_bytes"] < found["factor_bytes"] + 400 <= 400 + 0.04 * found["base_bytes"]
        assert found["predicted"] > plain["predicted"]
        factors = glowq.Correction.from_pretrained(tmp_path / "small").factors
        assert {entry.bits for entry in factors} == {int(name.removeprefix("int"))}
        assert f"({name})" in (tmp_path / "small" / "README.md").read_text()
        tiny.load(tmp_path / "small")

    @pytest.mark.parametrize("name", ["select", "9%"])
    def test_an_output_with_the_name_of_another_word(
        self, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        arguments = ["select", str(whole), "--budget", "9%", "--factor-dtype", "int8", "--output", name]
        monkeypatch.setattr("sys.argv", ["glowq", *arguments])
        assert run(*arguments)[0] == 0
        stored = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]["provenance"]
        assert stored["command"].endswith("--budget 9% --factor-dtype int8 --output OUT2")
        assert "glowq select " in stored["command"]

    def test_a_budget_above_the_whole(self, whole: Path, tmp_path: Path) -> None:
        arguments = ["select", whole, "--budget", "90%", "--factor-dtype", "int8", "--output", tmp_path / "x"]
        done = CliRunner().invoke(app, list(map(str, arguments)))
        assert done.exit_code == 1
        assert " bytes, but " in done.stderr
        assert " in int8 (" in done.stderr

    def test_inspect_counts_every_byte(self, saved: Path, corrected: tuple[Any, glowq.Correction]) -> None:
        status, found = run("inspect", saved)
        assert status == 0
        assert found["factor_bytes"] == corrected[1].factor_bytes

    def test_verify(self, saved: Path) -> None:
        assert run("verify", saved)[0] == 0

    def test_a_dtype_that_is_none_is_wrong_usage(self, whole: Path, tmp_path: Path) -> None:
        assert run("select", whole, "--budget", "20%", "--factor-dtype", "int2", "--output", tmp_path / "x")[0] == 2


class TestExports:
    """Exports without whole numbers hold the same values as floats."""

    def test_merged_and_peft(self, saved: Path, corrected: tuple[Any, glowq.Correction], tmp_path: Path) -> None:
        for to in ("merged", "peft"):
            export(str(saved), to, tmp_path / to)
        adapter = load_file(tmp_path / "peft" / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in adapter.values()} == {torch.bfloat16}
        entry = corrected[1].factors[0]
        (found,) = (value for name, value in adapter.items() if f"{entry.group.members[0]}.lora_A" in name)
        assert torch.equal(found, entry.right)

    @pytest.mark.slow
    def test_onnx(self, tmp_path: Path) -> None:
        source = tiny.tiny_llama(tmp_path / "llama", num_hidden_layers=1)
        correction = tiny.corrected(source, "nf4", rank=None, budget="12%", factor_dtype="int4")[1]
        assert all(entry.bits == 4 for entry in correction.factors)
        correction.save_pretrained(tmp_path / "correction")
        facts = export(str(tmp_path / "correction"), "onnx", tmp_path / "onnx")
        assert facts["check"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: glowq.GlowQConfig(base="nf4", factor_dtype="int2"),
            ConfigError,
            "must be one of auto, float, int8, int4, int3, found 'int2'",
        ),
        (
            lambda: glowq.GlowQConfig(base="nf4", correction="folder", factor_dtype="int8"),
            ConfigError,
            r"round a saved one with Correction\.rounded",
        ),
    ],
)
def test_bad_requests(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
