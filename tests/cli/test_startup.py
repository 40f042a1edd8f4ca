"""Imports at startup: help, usage errors and `import glowq` do not import torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from glowq.cli.options import BASE_NAMES, EXPORT_NAMES, METHOD_NAMES, FactorDtypeOption, RoundedDtype
from glowq.factors.form import FACTOR_DTYPES
from glowq.integrations.export.registry import TARGETS
from glowq.quantizers.registry import base_names
from glowq.solving.methods.base import method_names
from support.tiny import CHEAP, corrected, tiny_llama

HEAVY = ("accelerate", "datasets", "huggingface_hub", "numpy", "torch", "transformers")
# The only module outside glowq that `import glowq` adds to the imports of transformers' registry. It holds Conv1D, a
# layer that glowq corrects, and imports no further modules.
ADDED = {"transformers.pytorch_utils"}

RUN = """
from glowq.cli.app import app
try:
    app({arguments!r}, prog_name="glowq")
except SystemExit as ending:
    status = ending.code
"""


def after(code: str) -> dict[str, Any]:
    """Run `code` in a new process. Return its global integers, strings and lists, and the imported "modules"."""
    report = """
import json, sys
found = {name: value for name, value in list(globals().items()) if isinstance(value, int | str | list)}
print("\\n" + json.dumps({**found, "modules": sorted(sys.modules)}))
"""
    settings = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code + report]
    done = subprocess.run(command, capture_output=True, text=True, env=settings, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["correct", "--help"], 0),
        (["compare", "--help"], 0),
        (["inspect", "--help"], 0),
        ([], 2),
        (["nothing"], 2),
        (["--nothing"], 2),
        (["correct"], 2),
        (["inspect", "a", "--nothing"], 2),
        (["select", "a", "--budget", "much", "--output", "b"], 2),
        (["correct", "a", "--base", "nf5", "--calibration", "b", "--output", "c"], 2),
        (["compare", "a", "--methods", "magic", "--calibration", "b", "--data", "c"], 2),
        (["export", "a", "--to", "onyx", "--output", "b"], 2),
    ],
    ids=str,
)
def test_an_answer_needs_no_torch(arguments: list[str], status: int) -> None:
    found = after(RUN.format(arguments=arguments))
    assert found["status"] == status
    assert not set(HEAVY) & set(found["modules"])


@pytest.fixture(scope="module")
def correction(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("startup")
    tiny_llama(folder / "model", num_hidden_layers=1)
    _, found = corrected(folder / "model", "torchao-int4", **CHEAP)
    found.save_pretrained(folder / "correction")
    return folder / "correction"


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["inspect", "FOLDER"], 0),
        (["verify", "FOLDER", "--headers"], 0),
        (["select", "FOLDER", "--budget", "90%", "--output", "b"], 1),  # more than it has
        (["push", "FOLDER", "org/name"], 1),  # its base is a local folder
    ],
    ids=str,
)
def test_reading_a_saved_correction_needs_no_torch(correction: Path, command: list[str], status: int) -> None:
    found = after(RUN.format(arguments=[word.replace("FOLDER", str(correction)) for word in command]))
    assert found["status"] == status
    assert not {"accelerate", "datasets", "torch", "transformers"} & set(found["modules"])


def test_importing_glowq_needs_no_torch() -> None:
    assert not set(HEAVY) & set(after("import glowq")["modules"])


def test_help_names_every_base_and_method() -> None:
    assert list(BASE_NAMES) == base_names()
    assert list(METHOD_NAMES) == method_names()
    assert list(EXPORT_NAMES) == sorted(TARGETS)
    assert get_args(get_args(FactorDtypeOption)[0]) == ("auto", *FACTOR_DTYPES)
    assert get_args(RoundedDtype) == ("auto", *(name for name, bits in FACTOR_DTYPES.items() if bits))


@pytest.mark.parametrize("name", ["dense", "divided_experts", "hqq", "zero_points"])
def test_a_loader_can_be_the_first_import(name: str) -> None:
    code = f"import glowq.quantizers.loading.{name}; import transformers.quantizers.auto as auto"
    assert after(f"{code}; known = sorted({{'dense', 'glowq'}} & set(auto.AUTO_QUANTIZER_MAPPING))")["known"] == [
        "dense",
        "glowq",
    ]


# Each order of the imports needs a new interpreter, which takes seconds. Both are asked all questions at once.
REGISTRY = """
import transformers.quantizers.auto
at_once = sorted(sys.modules)
{then}
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
known = [int("glowq" in mapping) for mapping in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING)]
"""
WATCHED = """
import builtins, sys
asked, plain = [], builtins.__import__
def watching(name, globals=None, *rest, **more):
    importer = (globals or {}).get("__name__", "")
    if importer.partition(".")[0] == "glowq" and name.startswith("torch._dynamo"):
        asked.append(importer)
    return plain(name, globals, *rest, **more)
builtins.__import__ = watching
import glowq
"""
COMPILER = """
import glowq.evaluation.timing, glowq.integrations.transformers.quantizer, glowq.runtime.attach
import torch._dynamo.config
flag = torch._dynamo.config.skip_nnmodule_hook_guards
"""


@pytest.fixture(scope="module")
def glowq_first() -> dict[str, Any]:
    return after(WATCHED + REGISTRY.format(then="") + COMPILER)


@pytest.fixture(scope="module")
def glowq_last() -> dict[str, Any]:
    return after("import sys" + REGISTRY.format(then="import glowq"))


@pytest.mark.parametrize("order", ["glowq first", "glowq last"])
def test_transformers_registry_knows_glowq(order: str, request: pytest.FixtureRequest) -> None:
    assert request.getfixturevalue(order.replace(" ", "_"))["known"] == [1, 1]


def test_registration_imports_little_that_transformers_does_not(
    glowq_first: dict[str, Any], glowq_last: dict[str, Any]
) -> None:
    added = set(glowq_first["at_once"]) - set(glowq_last["at_once"])
    assert "glowq" in added
    assert {name for name in added if name.partition(".")[0] not in ("glowq", "glowq_kernels")} <= ADDED


def test_imports_set_nothing_of_the_compiler_and_do_not_import_it(glowq_first: dict[str, Any]) -> None:
    """No module of glowq imports `torch._dynamo` at import time; torch and transformers may import it themselves."""
    assert glowq_first["asked"] == []
    assert glowq_first["flag"] is True
