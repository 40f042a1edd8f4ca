"""Changed config.json and factor files: each is refused by an error of glowq, or gives the very same factors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from glowq.artifact.config import GlowQConfig
from glowq.artifact.correction_config import CorrectionConfig
from glowq.artifact.factor_files import read_factors
from glowq.artifact.saved import read_saved
from glowq.errors import ModelNotFoundError
from glowq.models.headers import read_headers
from glowq.models.model_config import read_model_config
from glowq.selection.budget import RankRequest
from glowq.selection.curve import budget_curve
from support.forms import Saved, applied
from support.fuzzing import Part, parts, refusal
from support.mutations import byte_changes, header_changes, json_changes

REQUESTS = [RankRequest(1), RankRequest(None, "2%"), RankRequest(None, "recover 50%"), RankRequest(None, 600, 2, 64)]


def read(folder: Path, saved: Saved) -> tuple[CorrectionConfig, dict[str, Any]]:
    """Read a form as its doors do, and return its config and the factors that it applies."""
    if saved.weights == "model.safetensors":
        stored = read_model_config(folder / "config.json").get("quantization_config")
        if stored is None:
            raise ModelNotFoundError("transformers would load this as a model without a correction")
        config = GlowQConfig.of_file(str(folder), stored)
        return config, applied(read_factors([folder / saved.weights], config.groups or {}))
    opened = read_saved(folder)
    found = applied(read_factors([folder / saved.weights], opened.config.groups or {}))
    for request in REQUESTS:
        refusal(lambda request=request: opened.choose(request))
    budget_curve(opened.headers.group_gains, opened.config.total, opened.base_bytes)
    return opened.config, found


def check(folder: Path, saved: Saved) -> None:
    """Either an error of glowq, or the same factors, and a config that can be saved again as it is."""

    def door() -> None:
        config, factors = read(folder, saved)
        assert factors == saved.factors
        stored = config.to_dict()
        assert GlowQConfig(**stored).to_dict() == stored
        json.dumps(stored, allow_nan=False)
        assert len(repr(config)) < 2000

    refusal(door)
    refusal(lambda: read_headers(str(folder)))


@parts(4_000)
def test_fields(saved: Saved, part: Part, copy: Path) -> None:
    """Any field of config.json."""
    config = json.loads(saved.config)
    part.run(json_changes(), lambda change: check(saved.copy(copy, json.dumps(change(config)).encode()), saved))


@parts(6_000)
def test_fields_of_the_correction(saved: Saved, part: Part, copy: Path) -> None:
    """The fields of config.json that glowq wrote."""
    config = json.loads(saved.config)

    def case(change: Any) -> None:
        changed = {**config, "quantization_config": change(config["quantization_config"])}
        check(saved.copy(copy, json.dumps(changed).encode()), saved)

    part.run(json_changes(), case)


@parts(2_000)
def test_bytes_of_the_config(saved: Saved, part: Part, copy: Path) -> None:
    part.run(byte_changes(len(saved.config)), lambda change: check(saved.copy(copy, change(saved.config)), saved))


@parts(4_000)
def test_headers(saved: Saved, part: Part, copy: Path) -> None:
    part.run(header_changes(), lambda change: check(saved.copy(copy, content=change(saved.content)), saved))


@parts(2_000)
def test_bytes_of_the_factors(saved: Saved, part: Part, copy: Path) -> None:
    start = 8 + int.from_bytes(saved.content[:8], "little")
    part.run(byte_changes(start), lambda change: check(saved.copy(copy, content=change(saved.content)), saved))


@parts(2_000)
def test_bytes_of_both(saved: Saved, part: Part, copy: Path) -> None:
    both = st.tuples(byte_changes(len(saved.config), 1), byte_changes(len(saved.content), 1))

    def case(changes: Any) -> None:
        check(saved.copy(copy, changes[0](saved.config), changes[1](saved.content)), saved)

    part.run(both, case)
