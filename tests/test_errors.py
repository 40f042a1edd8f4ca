"""Every error and warning of glowq: what it means, what to do, and a public function or command that raises it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import glowq
from glowq import errors
from glowq.solving.methods import base as methods
from glowq.utils.versions import warn_untested
from support.bases import repacks
from support.cli import call
from support.corrections import changed
from support.forms import IDS, write_forms
from support.fresh_process import run_python
from support.gradients import cut_gradient
from support.tiny import CHEAP, load, quantized, tiny_llama

GUIDE = Path(__file__).parents[1] / "examples" / "guides" / "errors.md"
GOLDEN = Path(__file__).parent / "artifact" / "golden" / "format-1.0-bfloat16"
MORE = {"calibration": torch.arange(640).mul(37).remainder(64).view(40, 16), "calibration_tokens": 640}
KINDS = {name: getattr(errors, name) for name in errors.__all__ if isinstance(getattr(errors, name), type)}


@dataclass(frozen=True)
class Place:
    """Folders with base/, correction/ and full/ of one tiny model, and an empty folder to write to."""

    saved: Path
    empty: Path

    @property
    def base(self) -> Path:
        return self.saved / "base"

    def correct(self, model: Any = None, **options: Any) -> Any:
        """Correct the base, which is quantized to nf4 unless it is given."""
        asked = {"calibration": IDS, "calibration_tokens": 128, "sequence_length": 16, "rank": 2, **CHEAP}
        model = quantized(self.base, "nf4") if model is None else model
        return glowq.correct(model, **{"reference": self.base, **asked, **options})

    def read(self, **fields: Any) -> Any:
        """Read the correction with other fields in its config.json."""
        return glowq.Correction.from_pretrained(
            changed(self.saved / "correction", self.empty / "copy", lambda stored: stored.update(fields))
        )

    def run(self, *arguments: object) -> None:
        """Run a command, and raise the error for which it ends with status 1."""
        done = call(*arguments)
        assert done.exit_code == 1, done.output
        error: BaseException | None = done.exception
        while error is not None and not isinstance(error, errors.GlowQError):
            error = error.__cause__ or error.__context__
        assert error is not None, done.stderr
        raise error


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("saved")
    write_forms(root)
    return root


CASES: dict[str, Callable[[Place], Any]] = {}


def case(run: Callable[[Place], Any]) -> Callable[[Place], Any]:
    CASES[run.__name__] = run
    return run


@case
def ConfigError(place: Place) -> None:
    glowq.GlowQConfig(base="nf4", rnak=4)


@case
def VersionError(place: Place) -> None:
    place.read(version=2)


@case
def UnsafePathError(place: Place) -> None:
    place.read(base_model={"name": "../elsewhere", "revision": None, "fingerprint": "sha256:0"})


@case
def PickleRefusedError(place: Place) -> None:
    shutil.copy(place.base / "config.json", place.empty)
    (place.empty / "pytorch_model.bin").write_bytes(b"")
    place.run("inspect", place.empty)


@case
def ModelNotFoundError(place: Place) -> None:
    place.run("inspect", place.empty / "absent")


@case
def ReadError(place: Place) -> None:
    (place.empty / "config.json").mkdir()
    place.run("inspect", place.empty)


@case
def OutputError(place: Place) -> None:
    (place.empty / "notes.txt").write_text("mine")
    place.read().save_pretrained(place.empty)


@case
def UnknownBaseError(place: Place) -> None:
    glowq.GlowQConfig(base="nf5", calibration=["text"])


@case
def BackendError(place: Place) -> None:
    pytest.importorskip("hqq")
    config = json.loads((place.base / "config.json").read_text())
    settings = {"weight_quant_params": {"nbits": 4, "group_size": 64, "axis": 1}}
    config["quantization_config"] = {"quant_method": "hqq", "quant_config": settings, "skip_modules": ["lm_head"]}
    shutil.copy(place.base / "model.safetensors", place.empty)
    (place.empty / "config.json").write_text(json.dumps(config))
    load(place.empty)


@case
def RepackedWeightError(place: Place) -> None:
    if not repacks():
        pytest.skip("bitsandbytes rewrites weights on AVX512-BF16 CPUs only")
    model = load(place.saved / "correction")
    glowq.use_fast_kernels(model)
    model.save_pretrained(place.empty)


@case
def UnsupportedModuleError(place: Place) -> None:
    place.correct(load(place.base))


@case
def CalibrationError(place: Place) -> None:
    place.correct(calibration=[" "])


@case
def NoGainError(place: Place) -> None:
    place.correct(load(place.base), dense=True, rank=None, budget="50%", **MORE)


@case
def NoImprovementError(place: Place) -> None:
    def backwards(*arguments: Any, **options: Any) -> Any:
        found = methods.get_method("svd").solve(*arguments, **options)
        return replace(found, left=-found.left)

    model = quantized(place.base, "torchao-int2")
    with patch.dict(methods._METHODS):  # the method is gone again for other tests
        methods.register(replace(methods.get_method("svd"), name="backwards", solve=backwards))
        place.correct(model, method="backwards", rank=32, force=False, **MORE)


@case
def SensitivityError(place: Place) -> None:
    model = quantized(place.base, "nf4")
    cut_gradient(model.model.norm)
    place.correct(model, distill=1)


@case
def TokenizerMismatchError(place: Place) -> None:
    place.correct(calibration=IDS + 64)


@case
def NonFiniteError(place: Place) -> None:
    folder = Path(shutil.copytree(place.saved / "correction", place.empty / "copy"))
    tensors = load_file(folder / "glowq.safetensors")
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, folder / "glowq.safetensors")
    glowq.Correction.from_pretrained(folder)


@case
def RankError(place: Place) -> None:
    place.read().cut(rank=0)


@case
def RoundingError(place: Place) -> None:
    """One large value in each factor, beside hundreds that are smaller than half a step of int8."""
    correction = glowq.Correction.from_pretrained(GOLDEN).kept({"model.layers.0.mlp.down_proj": 2})
    entry = correction.factors[0]
    for factor in (entry.right, entry.lefts["model.layers.0.mlp.down_proj"].T):
        factor.fill_(0.49)[:, 0] = 127
    entry.gains[1] = 0
    correction.rounded("int8")


@case
def ReferenceMismatchError(place: Place) -> None:
    place.correct(reference=tiny_llama(place.empty / "other"))


@case
def FoldingError(place: Place) -> None:
    model = load(place.base)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(torch.linspace(0.3, 3, 128))
    place.correct(model, dense=True)


@case
def CorrectionError(place: Place) -> None:
    folder = Path(shutil.copytree(place.saved / "correction", place.empty / "copy"))
    (folder / "glowq.safetensors").write_bytes(b"{}")
    glowq.Correction.from_pretrained(folder)


@case
def FingerprintError(place: Place) -> None:
    glowq.load_correction(quantized(place.base, "fp4"), place.saved / "correction")


@case
def EvaluationError(place: Place) -> None:
    other = tiny_llama(place.empty / "other", vocab_size=5000)
    (place.empty / "text.txt").write_text("text")
    place.run("evaluate", place.base, other, "--data", place.empty / "text.txt")


@case
def ExportError(place: Place) -> None:
    place.run("export", place.base, "--to", "merged", "--output", place.empty / "out")


@case
def HubError(place: Place) -> None:
    program = f"""
import glowq
try:
    glowq.Correction.from_pretrained({str(GOLDEN)!r}).push_to_hub("me/corr", base_model="org/base", token="none")
except glowq.GlowQError as error:
    print(type(error).__name__, error)
"""
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    done = run_python("-c", program, cwd=place.empty, env={**os.environ, **nobody})
    name, _, message = done.stdout.strip().rpartition("\n")[2].partition(" ")
    raise getattr(errors, name)(message)


@case
def UntestedVersionWarning(place: Place) -> None:
    quantized(place.base, "nf4")
    warn_untested.cache_clear()
    with pytest.MonkeyPatch.context() as patch:  # the installed version is one that glowq is tested with
        patch.setattr(importlib.metadata, "version", lambda name: "99.1")
        glowq.load_correction(quantized(place.base, "nf4"), place.saved / "correction")
    warn_untested.cache_clear()


@case
def NewerFormatWarning(place: Place) -> None:
    place.read(minor=99, colour="blue")


@case
def NoGradientWarning(place: Place) -> None:
    model, reference = quantized(place.base, "nf4"), AutoModelForCausalLM.from_pretrained(place.base)
    for cut in (model, reference):
        cut_gradient(cut.model.norm)
    place.correct(model, reference=reference, method="glowq")


def test_every_kind_has_a_case() -> None:
    assert set(CASES) == set(KINDS) - {"GlowQError"}
    assert all(issubclass(kind, errors.GlowQError | UserWarning) for kind in KINDS.values())


@pytest.mark.parametrize("name", CASES)
def test_it_is_raised(name: str, saved: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", KINDS[name] if issubclass(KINDS[name], Warning) else RuntimeWarning)
        with pytest.raises(KINDS[name]) as raised:
            CASES[name](Place(saved, tmp_path))
    assert next(kind for kind in raised.type.__mro__ if kind in KINDS.values()) is KINDS[name]
    assert len(str(raised.value)) > 30


def documented() -> list[str]:
    """The rows of the guide's table, as the docstrings of the classes ask for."""
    rows = []
    for name, kind in sorted(KINDS.items(), key=lambda item: issubclass(item[1], Warning)):
        if kind is errors.GlowQError:
            continue
        meaning, _, remedy = " ".join((kind.__doc__ or "").split()).partition(" Remedy: ")
        assert remedy, f"the docstring of {name} has no remedy"
        rows.append(f"| `{name}` | {meaning.rstrip('.')} | {remedy.rstrip('.')} |")
    return rows


def test_the_table_of_the_guide_is_that_of_the_docstrings() -> None:
    found = re.findall(r"^\| `\w+(?:Error|Warning)` \|.*\|$", GUIDE.read_text(), re.MULTILINE)
    assert found == documented(), "write the rows of documented() into examples/guides/errors.md"
