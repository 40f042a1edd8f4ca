"""A config.json or a factor file of a stranger: whatever it holds, it raises a named error of glowq, and soon."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers.quantizers.auto import AutoQuantizationConfig

import glowq
from glowq.errors import GlowQError
from glowq.models.loading import load_config, model_class
from glowq.quantizers.settings import base_settings
from support.cli import call
from support.fuzzing import bounded

GOLDEN = Path(__file__).parent / "golden" / "format-1.0-bfloat16"
GROUP = "model.layers.0.mlp.down_proj"
SECONDS = 2.0  # of computing
MEMORY = 200 * 2**20  # bytes

Stored = dict[str, Any]
Change = Callable[[Stored], Any]


def _load_as_a_model(folder: Path) -> None:
    """What a command does with a model before it reads weights, and what transformers asks glowq for."""
    config = load_config(str(folder))
    model_class(config)
    base_settings(AutoQuantizationConfig.from_dict(config.quantization_config).base)


def _inspect(folder: Path) -> None:
    done = call("inspect", folder)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    if done.exit_code != 0:
        assert done.stderr.startswith("glowq: error: ")
        assert done.stderr.count("\n") == 1
        raise GlowQError(done.stderr)


DOORS: list[Callable[[Path], Any]] = [glowq.Correction.from_pretrained, _load_as_a_model, _inspect]


def refused(folder: Path, doors: list[Callable[[Path], Any]] = DOORS) -> list[GlowQError]:
    """Try every door: one at least must refuse with an error of glowq, and none may raise anything else."""
    errors = []
    for door in doors:
        with bounded(SECONDS, MEMORY):
            try:
                door(folder)
            except GlowQError as error:
                errors.append(error)
    assert errors
    assert all(0 < len(str(error)) < 1500 for error in errors)
    return errors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "stranger"))


def stored_in(folder: Path) -> Stored:
    found: Stored = json.loads((folder / "config.json").read_text())
    return found


def put(*path: str, value: Any) -> Change:
    """A change that sets a field; the path begins at the quantization config."""

    def change(config: Stored) -> None:
        inner = config["quantization_config"]
        for name in path[:-1]:
            inner = inner[name]
        inner[path[-1]] = value

    return change


def gone(*path: str) -> Change:
    def change(config: Stored) -> None:
        inner = config["quantization_config"]
        for name in path[:-1]:
            inner = inner[name]
        del inner[path[-1]]

    return change


def model_field(name: str, value: Any) -> Change:
    return lambda config: config.update({name: value})


def deep(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


# Values of every type that JSON has, and some that no field of a correction takes.
WRONG: dict[str, Any] = {
    "true": True,
    "negative": -1,
    "fraction": 0.5,
    "huge": 10**30,
    "list": [],
    "object": {},
    "nested": [[{}]],
    "words": "os.system",
}


def _wrong(*path: str, but: tuple[str, ...] = ()) -> dict[str, Change]:
    return {f"{'.'.join(path)}: {kind}": put(*path, value=value) for kind, value in WRONG.items() if kind not in but}


NUMBERS = ("fraction", "huge")
NOT_NAMES = {kind: value for kind, value in WRONG.items() if kind != "list"} | {"numbers": [1, 2]}
BOMB = "(a+)+$"
VARIANTS: dict[str, Change] = {
    # Of the correction.
    **_wrong("version", but=("huge",)),
    **_wrong("minor", but=("huge",)),
    **_wrong("format"),
    **_wrong("method", but=("words",)),
    **_wrong("seed", but=()),
    **_wrong("base_bytes"),
    **_wrong("base", but=("object",)),
    **_wrong("groups", but=("object",)),
    **_wrong("groups", GROUP),
    **_wrong("groups", GROUP, "members"),
    **_wrong("groups", GROUP, "out_features"),
    **_wrong("groups", GROUP, "in_features"),
    **_wrong("groups", GROUP, "rank"),
    **_wrong("groups", GROUP, "gains"),
    **_wrong("groups", GROUP, "total", but=("fraction",)),
    **_wrong("groups", GROUP, "block", but=("words",)),
    **_wrong("base_model"),
    **_wrong("base_model", "name", but=("words",)),
    **_wrong("base_model", "revision", but=("words",)),
    **_wrong("base_model", "fingerprint", but=("words",)),
    **_wrong("provenance", but=("object",)),
    **_wrong("provenance", "gains"),
    **_wrong("provenance", "total", but=("fraction",)),
    **_wrong("provenance", "held_out", but=("object",)),
    **_wrong("provenance", "rounding", but=("object",)),
    **_wrong("provenance", "selected", but=("object",)),
    **_wrong("provenance", "not_restored", but=("object",)),
    **_wrong("provenance", "mixed", but=("object",)),
    **_wrong("provenance", "command", but=("words",)),
    **_wrong("provenance", "glowq", but=("words",)),
    **_wrong("provenance", "calibration_tokens", but=("huge",)),
    **_wrong("provenance", "held_out", "corrected", but=("fraction", "negative")),
    **_wrong("provenance", "held_out", "recovered_ci95"),
    **_wrong("provenance", "held_out", "tokens"),
    **{f"no {name}": gone(name) for name in ("base_model", "groups")},
    **{f"group without {name}": gone("groups", GROUP, name) for name in ("members", "rank", "gains", "total")},
    "selected held out": put("provenance", "selected", value={"of_held_out": {"quantized": "x"}}),
    "benefit": put("provenance", "not_restored", value={"g": {"value": "x"}}),
    "rounding of a text": put("provenance", "rounding", value={"same_ranks": "x"}),
    "rounding of a text, up to 1.2": put("provenance", "int8", value={"int8": "x"}),
    **{f"widened: {kind}": put("provenance", "mixed", value={"widened": value}) for kind, value in NOT_NAMES.items()},
    "added bytes of a text": put("provenance", "mixed", value={"added_bytes": "x"}),
    "an interval of three": put("provenance", "held_out", "recovered_ci95", value=[1, 2, 3]),
    "an interval of lists": put("provenance", "held_out", "recovered_ci95", value=[[1], [2]]),
    "gains of 10^400": put("groups", GROUP, "gains", value=[10**400] * 7),
    "gains of NaN": put("groups", GROUP, "gains", value=[float("nan")] * 7),
    "gains of infinity": put("groups", GROUP, "gains", value=[float("inf")] * 7),
    "total of infinity": put("groups", GROUP, "total", value=float("inf")),
    "provenance of infinity": put("provenance", "held_out", "corrected", value=float("inf")),
    "rank of 10^12": put("groups", GROUP, "rank", value=10**12),
    "rank of 5,000 digits": put("groups", GROUP, "rank", value="DIGITS"),
    "a number of 5,000 digits": put("base", "llm_int8_threshold", value="DIGITS"),
    "an unknown field of a megabyte": put("x" * 2**20, value=1),
    "members of another": put("groups", GROUP, "members", value=["lm_head"]),
    "members twice": put("groups", GROUP, "members", value=[GROUP, GROUP]),
    "a width of 2^62": put("groups", GROUP, "in_features", value=2**62),
    # Of the base's name.
    "NUL in the name": put("base_model", "name", value="a\0b"),
    "the name climbs": put("base_model", "name", value="a/../../b"),
    "the name climbs backwards": put("base_model", "name", value="a\\..\\b"),
    "the revision climbs": put("base_model", "revision", value="../../../../etc/hostname"),
    "the revision is a path": put("base_model", "revision", value="/etc/hostname"),
    "NUL in the revision": put("base_model", "revision", value="a\0b"),
    # Of the base's quantizer.
    "another library's base": put("base", "quant_method", value="mxfp4"),
    "an unknown base": put("base", "quant_method", value="int1"),
    "the base is glowq": put("base", "quant_method", value="glowq"),
    "the base's method is a list": put("base", "quant_method", value=["bitsandbytes"]),
    "no method of the base": put("base", value={"bits": 4}),
    **{
        f"dtype {value!r}": put("base", "bnb_4bit_compute_dtype", value=value)
        for value in ("os.system", "load", "nn.Linear", "__class__", "Tensor", "", 5, ["float32"], {"a": 1})
    },
    "storage is a function": put("base", "bnb_4bit_quant_storage", value="hub"),
    **{
        f"pattern {value!r}": put("base", "llm_int8_skip_modules", value=[value])
        for value in (BOMB, "(a|a)*b", "a?" * 40 + "a" * 40, "(.*)*", ".*.*.*.*.*x", "[", "(?P<", "(?i)x", "*", 5, None)
        if value is not None
    },
    "a pattern alone": put("base", "llm_int8_skip_modules", value=BOMB),
    "a pattern in an object": put("base", "llm_int8_skip_modules", value={BOMB: 1}),
    "many patterns": put("base", "llm_int8_skip_modules", value=[".*a.*b.*c"] * 20),
    "patterns of a number": put("base", "llm_int8_skip_modules", value=5),
    "a pattern of gptq": put("base", value={"quant_method": "gptq", "bits": 4, "modules_to_not_convert": [BOMB]}),
    "a pattern of gptqmodel": put("base", value={"quant_method": "gptq", "bits": 4, "dynamic": {f"-:{BOMB}": {}}}),
    "a pattern of compressed-tensors": put(
        "base", value={"quant_method": "compressed-tensors", "ignore": [f"re:{BOMB}"]}
    ),
    "a dtype of torchao": put(
        "base",
        value={
            "quant_method": "torchao",
            "quant_type": {"default": {"_type": "torch.dtype", "_data": "load"}},
        },
    ),
    "torchao of another type": put("base", value={"quant_method": "torchao", "quant_type": 5}),
    "gptq of a text": put("base", value={"quant_method": "gptq", "bits": "many"}),
    "threshold of a text": put("base", "llm_int8_threshold", value="os.system"),
    "load_in_4bit of a text": put("base", "load_in_4bit", value="yes"),
    "the base is 900 deep": put("base", "extra", value=deep(900)),
    "the groups are 70 deep": put("groups", GROUP, "gains", value=deep(70)),
    "a group's name of 10,000 letters": put("groups", "x" * 10_000, value={}),
    "a member of 10,000 letters": put("groups", GROUP, "members", value=["x" * 10_000]),
    "an object in a number's place": model_field("attention_dropout", {"x": ["y" * 100] * 100}),
    "a pattern that is null": put("base", "llm_int8_skip_modules", value=[None]),
    "a surrogate in a group": put("groups", "\ud800", value={}),
    "a surrogate in the base": put("base", "extra", value="\udfff"),
    "a surrogate in the provenance": put("provenance", "command", value="glowq \ud912"),
    # Of the model.
    **{
        f"architecture {value!r}": model_field("architectures", value)
        for value in ("LlamaForCausalLM", [5], [["LlamaForCausalLM"]], {"0": "x"}, 5, True, ["BertModel"])
    },
    **{f"model type {value!r}": model_field("model_type", value) for value in (5, ["llama"], "nosuch", {}, True)},
    **{f"dtype of the model {value!r}": model_field("dtype", value) for value in (5, ["a"], {}, "cfloat16", "load")},
    **{f"hidden_size {value!r}": model_field("hidden_size", value) for value in ("x", [1], {})},
    **{f"layers {value!r}": model_field("num_hidden_layers", value) for value in ("x", [1])},
    **{
        f"quantization_config {value!r}": model_field("quantization_config", value)
        for value in (5, [], "glowq", True, {"quant_method": 5}, {"quant_method": "glowq"}, {})
    },
    "a request in a file": model_field(
        "quantization_config", {"quant_method": "glowq", "base": "nf4", "calibration": "/etc/passwd"}
    ),
    "a model's pattern": model_field(
        "quantization_config", {"quant_method": "bitsandbytes", "llm_int8_skip_modules": [BOMB]}
    ),
    "the model is 900 deep": model_field("extra", deep(900)),
    "the model is 70 deep": model_field("extra", deep(70)),
    "a surrogate in the model": model_field("extra", "\udc00"),
}
assert len(VARIANTS) >= 150


@pytest.mark.parametrize("name", VARIANTS)
def test_a_hostile_config(folder: Path, name: str) -> None:
    config = stored_in(folder)
    VARIANTS[name](config)
    (folder / "config.json").write_text(json.dumps(config).replace('"DIGITS"', "9" * 5000))
    refused(folder)


TEXTS: dict[str, str | bytes] = {
    "empty": "",
    "no object": "[]",
    "a number": "1",
    "cut": '{"quantization_config": {',
    "900 deep": '{"a": ' + "[" * 900 + "]" * 900 + "}",
    "a million deep": '{"a": ' + "[" * 10**6 + "]" * 10**6 + "}",
    "two million lists": '{"a": [' + "[]," * (2 * 10**6) + "[]]}",
    "nine megabytes": '{"a": "' + "x" * (9 * 2**20) + '"}',
    "5,000 digits": '{"a": ' + "9" * 5000 + "}",
    "a million digits": '{"a": -' + "9" * 10**6 + "}",
    "surrogate": '{"a": "\\ud800"}',
    "surrogate in a key": '{"\\udfff": 1}',
    "no UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "NUL": b"\0" * 100,
    "a pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}\x94.",
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_file_that_is_no_config(folder: Path, name: str) -> None:
    content = TEXTS[name]
    (folder / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(folder)


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _loop(path: Path) -> None:
    path.symlink_to(path.with_name("other"))
    path.with_name("other").symlink_to(path)


IRREGULAR: dict[str, Callable[[Path], Any]] = {
    "pipe": _pipe,
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "empty device": lambda path: path.symlink_to("/dev/null"),
    "loop": _loop,
    "folder": lambda path: path.mkdir(),
    "folder behind a link": lambda path: path.symlink_to(path.parent),
    "nothing behind a link": lambda path: path.symlink_to("nothing"),
}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no named pipes and devices in folders")
@pytest.mark.parametrize("kind", IRREGULAR)
@pytest.mark.parametrize("file", ["config.json", "glowq.safetensors"])
def test_what_is_no_regular_file(folder: Path, file: str, kind: str) -> None:
    (folder / file).unlink()
    IRREGULAR[kind](folder / file)
    refused(folder)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no named pipes in folders")
@pytest.mark.parametrize("file", ["tokenizer.json", "generation_config.json", "model.safetensors.index.json"])
def test_a_pipe_beside_the_config_is_not_opened(folder: Path, file: str) -> None:
    os.mkfifo(folder / file)
    refused(folder)


def test_an_unknown_architecture_is_no_attribute_of_transformers(folder: Path) -> None:
    for name in ("pipeline", "AutoConfig", "logging", "PreTrainedModel", "os.system", "", "__version__"):
        config = stored_in(folder)
        config["architectures"] = [name]
        (folder / "config.json").write_text(json.dumps(config))
        assert model_class(load_config(str(folder))).__name__ == "AutoModelForCausalLM"


def test_numbers_that_real_models_have_are_read(folder: Path) -> None:
    config = stored_in(folder)
    config.update(time_step_limit=[0.0, float("inf")], model_max_length=10**30)
    (folder / "config.json").write_text(json.dumps(config))
    assert load_config(str(folder)).model_type == "llama"
    assert len(glowq.Correction.from_pretrained(folder).ranks) == 10


@pytest.mark.parametrize(
    "pattern",
    ["lm_head", "model.layers.0", r"model\.layers\.(0|1|2)\..*", "re:.*mlp.gate$"],
)
def test_patterns_that_real_models_have_are_read(folder: Path, pattern: str) -> None:
    config = stored_in(folder)
    config["quantization_config"]["base"]["llm_int8_skip_modules"] = [pattern, "lm_head"]
    (folder / "config.json").write_text(json.dumps(config))
    assert len(glowq.Correction.from_pretrained(folder).ranks) == 10


def test_settings_that_real_quantizers_have_are_read(folder: Path) -> None:
    config = stored_in(folder)
    for base in (
        {
            "quant_method": "gptq",
            "bits": 4,
            "dynamic": {r"+:.*\.18\..*(?:gate|up|down).*": {"bits": 8}, "-:.*lm_head": {}},
        },
        {
            "quant_method": "compressed-tensors",
            "ignore": ["re:^(?!.*mlp).*"],
            "config_groups": {"a": {"targets": ["Linear"]}},
        },
        {"load_in_4bit": True, "bnb_4bit_compute_dtype": "torch.float16"},
    ):
        config["quantization_config"]["base"] = base
        (folder / "config.json").write_text(json.dumps(config))
        assert glowq.Correction.from_pretrained(folder).config.base == base


# The factor file: 8 bytes with the length of the header, the header in JSON, the values.

RIGHT, LEFT = f"{GROUP}.right", f"{GROUP}.left"
FACTOR_DOORS: list[Callable[[Path], Any]] = [glowq.Correction.from_pretrained, _inspect]


def parts_of(folder: Path) -> tuple[dict[str, Any], bytes]:
    content = (folder / "glowq.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    return header, content[8 + length :]


def with_header(header: Any, values: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + values


def _entry(name: str, **fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header[name].update(fields)


HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    **{
        f"{name.rpartition('.')[2]} dtype {dtype!r}": _entry(name, dtype=dtype)
        for name in (RIGHT, LEFT)
        for dtype in ("F64", "F32", "I8", "U8", "I64", "BOOL", "F8_E4M3", "os.system", "", 5, None, [], {})
    },
    **{
        f"{name.rpartition('.')[2]} shape {shape!r}": _entry(name, shape=shape)
        for name in (RIGHT, LEFT)
        for shape in ([], [1], [0, 0], [-1, 768], [2**62, 2**62], [10**30, 1], "7", None, [7.5, 1], [[7], 768], {})
    },
    **{
        f"{name.rpartition('.')[2]} offsets {offsets!r}": _entry(name, data_offsets=offsets)
        for name in (RIGHT, LEFT)
        for offsets in ([], [0], [0, 0], [0, 10**30], [5, 1], [-1, 10], [2**63, 2**64 - 1], "x", None, [0, 1, 2])
    },
    **{
        f"{name.rpartition('.')[2]} is {value!r}": (lambda header, name=name, value=value: header.update({name: value}))
        for name in (RIGHT, LEFT)
        for value in (5, None, [], {}, "x")
    },
    "right is missing": lambda header: header.pop(RIGHT),
    "left is missing": lambda header: header.pop(LEFT),
    "right is renamed": lambda header: header.update({"other.right": header.pop(RIGHT)}),
    "two are swapped": lambda header: header.update({RIGHT: header[LEFT], LEFT: header[RIGHT]}),
    "both are one": lambda header: header.update({RIGHT: header[LEFT]}),
    "everything is missing": lambda header: header.clear(),
    "metadata of a list": lambda header: header.update(__metadata__=[]),
    "metadata of numbers": lambda header: header.update(__metadata__={"format": 5}),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_header(folder: Path, name: str) -> None:
    header, values = parts_of(folder)
    HEADERS[name](header)
    (folder / "glowq.safetensors").write_bytes(with_header(header, values))
    refused(folder, FACTOR_DOORS)


def test_a_truncated_factor_file(folder: Path) -> None:
    content = (folder / "glowq.safetensors").read_bytes()
    for kept in (*range(0, 12), 100, 1000, len(content) // 2, len(content) - 1):
        (folder / "glowq.safetensors").write_bytes(content[:kept])
        refused(folder, FACTOR_DOORS)


def test_a_header_that_is_none(folder: Path) -> None:
    header, values = parts_of(folder)
    for text, length in (
        (b"", None),
        (b"{}", 2**63),
        (b"{}", 2**64 - 1),
        (b"{}", 10**8),
        (b"[]", None),
        (b"{" * 10**5, None),
        (b'{"a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", None),
        (b"\xff" * 100, None),
        (json.dumps(header).encode()[:-1], None),
        (json.dumps(header).encode().replace(b"}", b"\0"), None),
    ):
        (folder / "glowq.safetensors").write_bytes(with_header(text, values, length))
        refused(folder, FACTOR_DOORS)
