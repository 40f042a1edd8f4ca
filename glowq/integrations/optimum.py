"""The exporter "glowq" of optimum: `main_export`, and its registration with `TasksManager`.

An installed glowq also has the module `optimum.exporters.glowq`, where users of optimum look for an exporter.
"""

from __future__ import annotations

import os
from typing import Any

from optimum.exporters.base import ExporterConfig
from optimum.exporters.tasks import TasksManager
from optimum.utils import DummyTextInputGenerator, NormalizedTextConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from ..artifact.request import CorrectionRequest
from ..errors import ConfigError
from ..models.loading import load_config
from .transformers.checkpoint import correct_checkpoint

__all__ = ["GlowQExporterConfig", "main_export", "register"]

EXPORTER = "glowq"


class GlowQExporterConfig(ExporterConfig):  # type: ignore[misc]
    """Describes the inputs of a forward to optimum. They are the same for every architecture."""

    NORMALIZED_CONFIG_CLASS = NormalizedTextConfig
    DUMMY_INPUT_GENERATOR_CLASSES = (DummyTextInputGenerator,)

    @property
    def inputs(self) -> dict[str, dict[int, str]]:
        """Input name -> axis -> name of the axis."""
        axes = {0: "batch_size", 1: "sequence_length"}
        return {"input_ids": axes, "attention_mask": axes}


def register() -> None:
    """Register the exporter "glowq" with `TasksManager` for every text model of transformers.

    A second call does nothing.
    """
    declare = TasksManager.create_register(EXPORTER)
    tasks: dict[str, Any] = {"text-generation": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    tasks["feature-extraction"] = MODEL_MAPPING_NAMES
    for task, mapping in tasks.items():
        for model_type in mapping:
            declare(model_type, task)(GlowQExporterConfig)


def main_export(
    model_name_or_path: str, output: str | os.PathLike[str], *, task: str = "auto", **options: Any
) -> dict[str, Any]:
    """Quantize a model if asked to, correct it, and save the result, as `glowq correct` does.

    Args:
        model_name_or_path: folder or Hub name of the model.
        output: folder to write; must be new, empty, or an earlier result.
        task: "text-generation" or "feature-extraction" (optimum's names); "auto" takes the class in config.json.
        **options: options of `glowq.integrations.transformers.checkpoint.correct_checkpoint`, and fields of
            `CorrectionRequest`; `calibration` is required.

    Returns:
        See `correct_checkpoint`.

    Raises:
        ConfigError: the model cannot be corrected for this task.
        GlowQError: see `correct_checkpoint`.
    """
    register()
    asked = {name: options.pop(name) for name in CorrectionRequest.names() if name in options}
    options["request"] = CorrectionRequest.of(options.get("request"), asked)
    if task == "auto":
        return correct_checkpoint(model_name_or_path, output, **options)
    model_type = load_config(model_name_or_path, options.get("gguf_file")).model_type
    try:
        TasksManager.get_exporter_config_constructor(
            EXPORTER, model_type=model_type, task=task, library_name="transformers"
        )
    except (KeyError, ValueError) as error:
        known = TasksManager._SUPPORTED_MODEL_TYPE.get(model_type, {}).get(EXPORTER, {})
        raise ConfigError(
            f"a {model_type} model cannot be corrected for the task {task!r}; possible tasks: "
            f"{', '.join(known) or 'none'}. Without --task, glowq takes the class that its config.json names."
        ) from error
    auto_class = TasksManager.get_model_class_for_task(task, model_type=model_type)
    return correct_checkpoint(model_name_or_path, output, auto_class=auto_class, **options)
