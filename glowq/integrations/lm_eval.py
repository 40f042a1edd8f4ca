"""Run tasks of lm-evaluation-harness on models that are already in memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, EvaluationError, one_line
from ..evaluation.figures import finite
from ..utils.names import did_you_mean
from ..utils.timeline import stage

if TYPE_CHECKING:
    from torch import nn

__all__ = ["check_tasks", "run_tasks"]


_Z95 = 1.96  # half the width of a normal 95% interval, in standard errors


def check_tasks(tasks: Sequence[str]) -> None:
    """Check that lm-evaluation-harness has these tasks, so that a wrong name fails before the work starts.

    Raises:
        ConfigError: lm-evaluation-harness is not installed, or has no task, group or tag with one of these names.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError("--tasks needs lm-evaluation-harness: pip install lm_eval")
    known = _task_manager().all_tasks
    for name in tasks:
        if name not in known and not Path(name).is_file():  # a task can also be the path of a YAML file
            advice = f"`lm-eval ls tasks` lists them all. {did_you_mean(name, known)}".rstrip()
            raise ConfigError(f"lm-evaluation-harness has no task {name!r}; {advice}")


@cache
def _task_manager() -> Any:
    """The harness's index of all its tasks; cached, because building it takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


@stage("tasks")
def run_tasks(model: nn.Module, tokenizer: Any, tasks: list[str], seed: int) -> dict[str, dict[str, Any]]:
    """Run tasks on a model.

    Args:
        model: a transformers model, with or without a correction.
        tokenizer: the tokenizer of the model.
        tasks: names of tasks, groups or tags of lm-evaluation-harness, or paths of YAML files.
        seed: seed of the few-shot examples and of every other random choice.

    Returns:
        Task -> metric -> {"value", "ci95"}. "ci95" is a 95% interval of the normal distribution, [low, high]; it is
        None where the harness gives no standard error.

    Raises:
        EvaluationError: a task is unknown, or its data cannot be loaded.
    """
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from ..models.fast_products import fast_products

    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    try:
        options = {"tasks": tasks, "task_manager": _task_manager(), "log_samples": False, **seeds}
        # By default the harness computes log-probabilities in the model's dtype. In bfloat16 their sums would be
        # rounded to whole numbers.
        with fast_products(model):
            found = simple_evaluate(
                model=HFLM(pretrained=model, tokenizer=tokenizer, softmax_dtype=torch.float32), **options
            )
    except (KeyError, ValueError, OSError) as error:
        raise EvaluationError(f"lm-evaluation-harness cannot run {', '.join(tasks)}: {one_line(error)}") from error
    return {task: _figures(metrics) for task, metrics in found["results"].items()}


def _figures(metrics: dict[str, Any]) -> dict[str, Any]:
    """Convert the harness's metrics of one task: "acc,none" and "acc_stderr,none" become {"acc": {...}}.

    The name of a filter stays in the key: {"acc,flexible": {...}}.
    """
    figures = {}
    for key, value in metrics.items():
        metric, _, chosen = key.partition(",")
        if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue  # a name, the number of documents, or a standard error
        error = metrics.get(f"{metric}_stderr,{chosen}")
        half = _Z95 * error if isinstance(error, int | float) else None
        figures[metric if chosen == "none" else key] = {
            "value": finite(float(value)),
            "ci95": None if half is None else [finite(value - half), finite(value + half)],
        }
    return figures
