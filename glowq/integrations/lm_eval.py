"""Tasks of lm-evaluation-harness on models that are in memory."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, EvaluationError, one_line
from ..evaluation.figures import finite

if TYPE_CHECKING:
    from torch import nn

__all__ = ["check_tasks", "run_tasks"]


_Z95 = 1.96  # standard errors in half a 95% interval


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuse early what could only fail at the end.

    Raises:
        ConfigError: lm-evaluation-harness is not installed, or knows no task, group or tag of such a name.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError("--tasks needs lm-evaluation-harness: pip install lm_eval")
    known = _task_manager().all_tasks
    for name in tasks:
        if name not in known and not Path(name).is_file():  # a task may be a YAML file of one's own
            near = get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"lm-evaluation-harness knows no task {name!r}; `lm-eval ls tasks` lists them all.{hint}")


@cache
def _task_manager() -> Any:
    """The harness's index of all its tasks, which takes seconds to build."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def run_tasks(model: nn.Module, tokenizer: Any, tasks: list[str], seed: int) -> dict[str, dict[str, Any]]:
    """Every task's figures, task -> metric -> {"value", "ci95"}; the interval is normal, None without an error of it.

    Args:
        model: transformers model, with whatever correction it carries.
        tokenizer: its tokenizer.
        tasks: names that lm-evaluation-harness knows.
        seed: of few-shot examples and everything else that it draws.

    Raises:
        EvaluationError: a task is unknown, or its data cannot be had.
    """
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    try:
        options = {"tasks": tasks, "task_manager": _task_manager(), "log_samples": False, **seeds}
        # In bfloat16, which is the harness's way with such models, sums of log-probabilities round to whole numbers.
        found = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, softmax_dtype=torch.float32), **options
        )
    except (KeyError, ValueError, OSError) as error:
        raise EvaluationError(f"lm-evaluation-harness cannot run {', '.join(tasks)}: {one_line(error)}") from error
    return {task: _figures(metrics) for task, metrics in found["results"].items()}


def _figures(metrics: dict[str, Any]) -> dict[str, Any]:
    """Of "acc,none" and "acc_stderr,none": {"acc": {...}}, or {"acc,flexible": {...}} where a filter is named."""
    figures = {}
    for key, value in metrics.items():
        metric, _, chosen = key.partition(",")
        if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue  # names, and how many documents there were
        error = metrics.get(f"{metric}_stderr,{chosen}")
        half = _Z95 * error if isinstance(error, int | float) else None
        figures[metric if chosen == "none" else key] = {
            "value": finite(float(value)),
            "ci95": None if half is None else [finite(value - half), finite(value + half)],
        }
    return figures
