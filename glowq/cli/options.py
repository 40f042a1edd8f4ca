"""Options that several commands take, each declared once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..errors import ConfigError
from ..utils.names import unknown_base, unknown_method

if TYPE_CHECKING:
    from ..selection.budget import RankRequest

__all__ = [
    "BASE_NAMES",
    "BUDGET",
    "EXPORT_NAMES",
    "METHOD_NAMES",
    "BaseOption",
    "BudgetOption",
    "ClozeOption",
    "DistillOption",
    "FactorDtypeOption",
    "JsonOption",
    "MaxRankOption",
    "MethodOption",
    "ModelArgument",
    "RankStepOption",
    "RoundedDtype",
    "RoundedDtypeOption",
    "SeedOption",
    "check_budget",
    "check_method",
    "distill_steps",
    "rank_request",
]

# The names of --base, --method and --to. The registries that define them import torch and transformers, which takes
# seconds: --help and a wrong name need none of it. So the names are repeated here, and a test compares them.
BASE_NAMES = (
    "fp4",
    "fp4-double",
    "gptq-2",
    "gptq-3",
    "gptq-4",
    "gptq-8",
    "hqq-2",
    "hqq-3",
    "hqq-4",
    "hqq-8",
    "int8",
    "nf4",
    "nf4-double",
    "quanto-float8",
    "quanto-int2",
    "quanto-int4",
    "quanto-int8",
    "torchao-int2",
    "torchao-int3",
    "torchao-int4",
    "torchao-int8",
)
METHOD_NAMES = (
    "aser",
    "d-rank",
    "eora",
    "fwsvd",
    "glowq",
    "glowq-one-sided",
    "glowq-published",
    "glowq-s",
    "glowq-s-ratio",
    "lqer",
    "qera",
    "svd",
    "zeroquant",
)
EXPORT_NAMES = ("merged", "onnx", "peft")
_OTHER_BASES = ("none", "dense")  # a model that is quantized already, and one that is in float


def _check_base(value: str) -> str:
    """Callback of --base. A name that is not known is wrong usage (status 2)."""
    if value not in (*_OTHER_BASES, *BASE_NAMES):
        raise typer.BadParameter(unknown_base(value, BASE_NAMES))
    return value


def check_method(value: str) -> str:
    """Callback of --method. A name that is not known is wrong usage (status 2)."""
    if value not in METHOD_NAMES:
        raise typer.BadParameter(unknown_method(value, METHOD_NAMES))
    return value


def check_budget(value: str | None) -> str | None:
    """Callback of an option that takes a budget of bytes. A budget that cannot be parsed is wrong usage (status 2)."""
    from ..selection.budget import parse_budget

    try:
        if value is not None:
            parse_budget(value, 10**12)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    return value


def rank_request(rank: int | None, budget: str | None, rank_step: int, max_rank: int | None) -> RankRequest:
    """The request of --rank, --budget, --rank-step and --max-rank. Conflicting values are wrong usage (status 2)."""
    from ..selection.budget import RankRequest

    try:
        return RankRequest(rank, budget, rank_step, max_rank)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error


def distill_steps(value: str) -> int | str:
    """What --distill says: a number of steps, or "auto".

    Raises:
        ConfigError: it says something else.
    """
    if value != "auto" and not value.isdecimal():
        raise ConfigError(f"--distill takes a number of steps or auto, found {value!r}.")
    return value if value == "auto" else int(value)


def _check_distill(value: str) -> str:
    """Callback of --distill. What cannot be read is wrong usage (status 2)."""
    try:
        distill_steps(value)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error
    return value


BaseOption = Annotated[
    str,
    typer.Option(
        callback=_check_base,
        help=f"Quantizer: {', '.join(BASE_NAMES)}; none: MODEL is quantized already; dense: MODEL's float weights hold "
        "quantized values.",
    ),
]
MethodOption = Annotated[
    str,
    typer.Option(callback=check_method, help=f"Solver method: {', '.join(METHOD_NAMES)}."),
]
BUDGET = "a share of the quantized weights (1.5%), a size (200MB), or as many as recover a predicted share of the lost "
BUDGET += "accuracy ('recover 80%')"
BudgetOption = Annotated[str | None, typer.Option(help=f"Bytes for the factors: {BUDGET}.")]
RankStepOption = Annotated[
    int, typer.Option(min=1, metavar="N", help="A budget gives ranks in multiples of N; 8 or 16 are good for kernels.")
]
MaxRankOption = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Largest rank that a budget gives a group.")
]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub name of a model.")]
RoundedDtype = Literal["auto", "int8", "int4", "int3"]
"""Forms to round the factors of a saved correction to; "auto" leaves them as they are."""

FactorDtypeOption = Annotated[
    Literal["auto", "float", "int8", "int4", "int3"],
    typer.Option(
        help="Form of the factors. float: the model's own dtype; int8, int4, int3: a budget gives about 2, 4 or 5 "
        "times the ranks; auto: int4 for a budget if it measures no worse than float, float for a rank."
    ),
]
RoundedDtypeOption = Annotated[
    RoundedDtype,
    typer.Option(help="Round the kept factors: a budget gives about 2, 4 or 5 times the ranks. auto: as they are."),
]
DistillOption = Annotated[
    str,
    typer.Option(
        callback=_check_distill,
        metavar="STEPS",
        help="Steps of gradient descent on the chosen factors; auto: up to 30, as long as they pay.",
    ),
]
ClozeOption = Annotated[
    int, typer.Option(min=0, metavar="N", help="Also ask N times which of 4 continuations the text has; 0: not.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of everything drawn at random.")]
