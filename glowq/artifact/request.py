"""`CorrectionRequest`: all settings of a correction that a user can choose, with their checks."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import ConfigError
from ..selection.budget import RankRequest, parse_target
from ..utils.checks import check_int
from ..utils.names import did_you_mean

__all__ = ["CorrectionRequest"]


@dataclass(frozen=True, kw_only=True, repr=False)
class CorrectionRequest:
    """The settings of a correction, used by `GlowQConfig`, `glowq.correct`, the command line and optimum's exporter.

    Attributes:
        rank: rank of every group, lowered if a group allows less; 32 if neither `rank` nor `budget` is given.
        budget: instead of `rank`: bytes for the ranks that gain most, given as a share of the quantized weights ("1%")
            or as a size ("200MB"); or a share of the predicted loss ("recover 80%"), which is recovered with the fewest
            bytes.
        rank_step: a budget gives ranks in multiples of this (8 or 16 are good for kernels), or the largest rank that a
            group's shape allows.
        max_rank: largest rank that a budget gives any group.
        method: name of the solver method, see `glowq.solving.methods`.
        calibration: text (list of str, file, folder, data set or datasets name, see `glowq.data.text.read_texts`; or
            several names, separated by commas, which give equal parts), or token ids (integers of shape (n, length), or
            a tokenizer's result, see `glowq.data.ids.id_sequences`), or samples of any other kind (a list of what a
            processor returns, a DataLoader, or a function that gives them, see `glowq.data.read_inputs.read_inputs`).
            Of text, an encoder with a decoder reads the first half of each sequence, and its decoder the second.
        calibration_tokens: number of tokens to use, taken from all parts of the text; of token ids and samples all are
            used. Of a loader, a function or an iterator, only as many samples as give a linear layer that many rows.
        sequence_length: tokens per sequence of text; lowered to the model's limit.
        distill: number of distillation steps, or "auto" to take up to 30, as long as they pay on held-out text. After
            the ranks are chosen, gradient descent on the factors brings the corrected model's answers nearer to the
            reference's. The ranks do not change, but the factors are no longer the optimum of each single group.
        factor_dtype: "float" for the model's own dtype; or "int8", "int4" or "int3" for fewer bytes, so that a budget
            gives about 2, 4 or 5 times the ranks. The loss of accuracy by rounding is measured on text that the factors
            were not calibrated on. "auto" takes "int4" for ranks that a budget buys by their gains, or "float" if
            rounding loses more than the saved bytes give; and "float" for a rank.
        seed: seed for the choice of sequences and for the solver.
        force: keep a correction that is measured to be no better than none, on text that it was not calibrated on.
        mixed: spend the budget on bits, too: quantize the groups with the next larger width that gain more by it than
            by ranks of the same bytes. The budget must be one of bytes, and the base must be quantized here.

    Raises:
        ConfigError: a field holds a value that cannot be used, or two fields exclude each other.
    """

    rank: int | None = None
    budget: str | int | None = None
    rank_step: int = 1
    max_rank: int | None = None
    method: str = "glowq"
    calibration: Any = None
    calibration_tokens: int = 32768
    sequence_length: int = 512
    distill: int | str = 0
    factor_dtype: str = "auto"
    seed: int = 0
    force: bool = False
    mixed: bool = False

    def __post_init__(self) -> None:
        from ..factors.form import bits_of
        from ..solving.methods.base import get_method

        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int)):
            raise ConfigError(f"rank must be a whole number of at least 1, found {self.rank!r}.")
        RankRequest(self.rank, self.budget, self.rank_step, self.max_rank)  # checks these four fields
        check_int("calibration_tokens", self.calibration_tokens, 1)
        check_int("sequence_length", self.sequence_length, 2)
        if self.distill != "auto":
            check_int("distill", self.distill, 0)
        check_int("seed", self.seed, 0)
        for name in ("force", "mixed"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, found {getattr(self, name)!r}.")
        bits_of(self.factor_dtype)  # checks the name
        method = get_method(self.method)
        if self.mixed and (self.budget is None or parse_target(self.budget) is not None or method.allocation != "gain"):
            raise ConfigError(
                "mixed (--mixed) divides a budget of bytes between ranks and bits by what each gains: give such a "
                "budget (--budget 3%), and a method that allocates by gain (glowq)."
            )
        if self.budget is not None and method.allocation in ("groups", "effective-rank"):
            raise ConfigError(
                f"method {self.method!r} divides a budget in the way of its paper, which only `glowq compare` does; "
                "give a rank, or method='glowq'."
            )

    @classmethod
    def of(cls, request: CorrectionRequest | None, options: Mapping[str, Any]) -> CorrectionRequest:
        """The request of a function that takes either a request or its fields.

        Args:
            request: the request, or None.
            options: field name -> value.

        Raises:
            ConfigError: both were given, or an option is not a field.
        """
        if request is not None and options:
            raise ConfigError(f"give either request or its fields ({', '.join(sorted(options))}), not both.")
        unknown = sorted(set(options) - set(cls.names()))
        if unknown:
            hint = did_you_mean(unknown[0], cls.names(), f"Known: {', '.join(cls.names())}.")
            raise ConfigError(f"unknown option {unknown[0]!r} of a correction. {hint}")
        return cls(**options) if request is None else request

    def of_quantized_model(self) -> CorrectionRequest:
        """This request, if it can be met for a model that is quantized already.

        Raises:
            ConfigError: it asks for a base with two widths.
        """
        if self.mixed:
            raise ConfigError(
                "mixed decides how the base is quantized, and this model is quantized already: use "
                "GlowQConfig(base=..., mixed=True) with from_pretrained, or `glowq correct --base ... --mixed`."
            )
        return self

    @classmethod
    def names(cls) -> list[str]:
        """The names of all fields, in their order."""
        return [field.name for field in fields(cls)]

    @property
    def factor_dtypes(self) -> tuple[str, ...]:
        """How to store the factors: names of `FACTOR_DTYPES`, of which the first that loses too little is taken."""
        from ..solving.methods.base import get_method

        if self.factor_dtype != "auto":
            return (self.factor_dtype,)
        by_gain = self.budget is not None and get_method(self.method).allocation == "gain"
        return ("int4", "float") if by_gain else ("float",)

    @property
    def ranks(self) -> RankRequest:
        """The four fields that determine the ranks of the groups."""
        return RankRequest(self.rank, self.budget, self.rank_step, self.max_rank)

    def asked(self) -> dict[str, Any]:
        """The fields that differ from their defaults. They are enough to make the same request again."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) is not field.default
            and (field.name == "calibration" or getattr(self, field.name) != field.default)
        }

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={reprlib.repr(value)}" for name, value in self.asked().items())
        return f"{type(self).__name__}({shown})"
