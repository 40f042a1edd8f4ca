"""`CorrectionRequest`: every function and command takes it and checks it, and a config never mixes it with a result."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig

import glowq
from glowq.artifact.request import CorrectionRequest
from glowq.cli.commands.correct import correct as command
from glowq.errors import ConfigError
from support.tiny import quantized

ASKED: dict[str, Any] = {
    "budget": "1.5%",
    "rank_step": 8,
    "max_rank": 64,
    "method": "glowq",
    "calibration": ["some text"],
    "calibration_tokens": 4096,
    "sequence_length": 128,
    "distill": 60,
    "factor_dtype": "int8",
    "seed": 3,
    "force": True,
    "mixed": True,
}
WRONG = [
    ({"rank": "8"}, "rank must be a whole number"),
    ({"rank": 8.0}, "rank must be a whole number"),
    ({"rank": True}, "rank must be a whole number"),
    ({"force": "yes"}, "force must be True or False"),
    ({"mixed": 1, "budget": "1%"}, "mixed must be True or False"),
    ({"mixed": True}, "divides a budget of bytes"),
    ({"mixed": True, "budget": "recover 50%"}, "divides a budget of bytes"),
    ({"mixed": True, "budget": "1%", "method": "svd"}, "a method that allocates by gain"),
    ({"rank": 4, "budget": "1%"}, "either rank or budget"),
    ({"budget": "much"}, "neither a share"),
    ({"rank_step": 8}, "give a budget with them"),
    ({"budget": "1%", "max_rank": 0}, "max_rank must be a whole number of at least 1"),
    ({"method": "best"}, "method must be one of"),
    ({"method": "glowq-s", "budget": "1%"}, "divides a budget in the way of its paper"),
    ({"calibration_tokens": "many"}, "calibration_tokens must be a whole number"),
    ({"sequence_length": 1}, "sequence_length must be a whole number of at least 2"),
    ({"distill": -1}, "distill must be a whole number"),
    ({"factor_dtype": "int2"}, "factor_dtype must be one of"),
    ({"seed": -1}, "seed must be a whole number"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_what_is_wrong_is_refused_by_every_api_before_any_work(options: dict[str, Any], message: str) -> None:
    for create in (CorrectionRequest, lambda **given: glowq.GlowQConfig(base="nf4", **given)):
        with pytest.raises(ConfigError, match=message):
            create(**options)
    with pytest.raises(ConfigError, match=message):
        glowq.correct(torch.nn.Linear(2, 2), reference="nobody/nothing", **options)


def test_an_option_that_does_not_exist_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown option 'rnak' .* Did you mean 'rank'"):
        glowq.correct(torch.nn.Linear(2, 2), reference="nobody/nothing", rnak=4)


def test_a_request_and_its_fields_at_once() -> None:
    with pytest.raises(ConfigError, match=r"either request or its fields \(seed\)"):
        glowq.correct(torch.nn.Linear(2, 2), reference="nobody/nothing", request=CorrectionRequest(), seed=1)


def test_it_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        CorrectionRequest().rank = 3  # type: ignore[misc]


def test_the_command_line_has_an_option_for_every_field() -> None:
    assert set(CorrectionRequest.names()) <= set(inspect.signature(command).parameters)


def test_optimum_has_an_option_for_every_field() -> None:
    import argparse

    from glowq.cli.optimum.commands import GlowQExportCommand

    parser = argparse.ArgumentParser()
    GlowQExportCommand.parse_args(parser)
    assert set(CorrectionRequest.names()) <= {action.dest for action in parser._actions}


def test_asked_makes_the_same_request_again() -> None:
    request = CorrectionRequest(**ASKED)
    assert CorrectionRequest(**request.asked()) == request
    assert CorrectionRequest().asked() == {}
    ids = torch.zeros(2, 4, dtype=torch.int64)
    assert CorrectionRequest(calibration=ids).asked()["calibration"] is ids


class TestConfig:
    def test_a_request_survives_its_dictionary(self) -> None:
        config = glowq.GlowQConfig(base="nf4", **ASKED)
        again = glowq.GlowQConfig.from_dict(config.to_dict())
        assert again.request == config.request
        assert {field.name: getattr(again.request, field.name) for field in fields(again.request)} == {
            "rank": None,
            **ASKED,
        }
        assert isinstance(again.base, BitsAndBytesConfig)
        assert again.to_dict() == config.to_dict()

    def test_an_attachment_survives_its_dictionary(self) -> None:
        config = glowq.GlowQConfig(base="nf4", correction="folder", budget="1%", rank_step=8)
        again = glowq.GlowQConfig.from_dict(config.to_dict())
        assert (again.correction, again.request) == ("folder", config.request)
        assert again.to_dict() == config.to_dict()

    def test_repr_shows_what_was_asked(self) -> None:
        shown = repr(glowq.GlowQConfig(base="nf4", rank=8, calibration=["text"], seed=3))
        assert shown == "GlowQConfig(base='bitsandbytes', CorrectionRequest(rank=8, calibration=['text'], seed=3))"

    @pytest.mark.parametrize(
        "idle",
        [
            {"rank": 4},
            {"method": "svd"},
            {"calibration_tokens": 100},
            {"sequence_length": 100},
            {"distill": 5},
            {"seed": 1},
        ],
    )
    def test_what_an_attached_correction_would_ignore_is_refused(self, idle: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=f"{next(iter(idle))} is an option of a new correction"):
            glowq.GlowQConfig(base="nf4", correction="folder", **idle)

    @pytest.mark.parametrize("idle", [{"format": "correction"}, {"base_bytes": 5}, {"provenance": {"total": 1.0}}])
    def test_what_a_request_would_ignore_is_refused(self, idle: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match="describes a stored correction"):
            glowq.GlowQConfig(base="nf4", calibration=["text"], **idle)

    @pytest.mark.parametrize("idle", [{"rank": 4}, {"calibration": ["text"]}, {"budget": "1%"}, {"correction": "x"}])
    def test_what_a_stored_correction_would_ignore_is_refused(self, idle: dict[str, Any]) -> None:
        named = {"base_model": {"name": "org/model", "revision": None, "fingerprint": "x"}}
        with pytest.raises(ConfigError, match="asks for a correction, and this configuration stores one"):
            glowq.GlowQConfig(base="nf4", groups={}, **named, **idle)


def test_a_request_by_fields_is_the_request(source: Any, tokenizer: Any) -> None:
    options: dict[str, Any] = {
        "calibration": torch.ones(8, 64, dtype=torch.int64).cumsum(1),
        "rank": 2,
        "method": "svd",
    }
    by_fields = glowq.correct(quantized(source, "nf4"), reference=source, **options)
    by_request = glowq.correct(quantized(source, "nf4"), reference=source, request=CorrectionRequest(**options))
    assert by_fields.config.to_dict() == by_request.config.to_dict()
    for name, tensor in by_fields.tensors().items():
        assert torch.equal(by_request.tensors()[name], tensor)
