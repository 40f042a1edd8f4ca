"""`correct()`: checkpoint -> groups -> moments -> factors -> correction, block by block."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from transformers import PreTrainedModel

from . import __version__
from .backends import Backend, prepare_model, read_weight
from .config import GlowQConfig
from .correction import Correction, describe_groups, fingerprint
from .data import batches, read_texts, token_sequences
from .errors import CalibrationError, ConfigError, RankError, TokenizerMismatchError, UnsupportedModuleError
from .groups import Group, Trace, trace_groups
from .methods import Method, get_method
from .progress import progress
from .reference import Reference
from .resume import Resume
from .runtime import GroupFactors, attach, attached, detach
from .selection import uniform_rank
from .statistics import MomentCollector, Moments
from .walk import BlockWalk

__all__ = ["correct"]

_TRACE_TOKENS = 8
_BATCH_TOKENS = 4096


def correct(
    model: nn.Module,
    *,
    reference: Any,
    calibration: Any = None,
    tokenizer: Any = None,
    rank: int | None = None,
    budget: str | int | None = None,
    method: str = "glowq",
    calibration_tokens: int = 32768,
    sequence_length: int = 512,
    seed: int = 0,
    resume: str | os.PathLike[str] | None = None,
) -> Correction:
    """Give a quantized model its accuracy back, and return what was added as a `Correction`.

    The model itself is corrected in place: it computes y = Q x + A (B x) afterwards (`glowq.detach` undoes it), and
    its own `save_pretrained` writes the self-contained form.

    Args:
        model: quantized transformers model.
        reference: the full-precision model that it was made from: a Hub name, a folder, or a model in memory.
        calibration: text (list of str, file, folder or datasets name), or token ids as a tensor of shape (n, length).
        tokenizer: turns the text into ids; needed unless `calibration` is a tensor.
        rank: rank of every group (lowered where a group allows less); 32 if neither it nor `budget` is given.
        budget: largest uniform rank within these bytes: a share of the quantized weights ("1%") or a size ("200MB").
        method: see `glowq.methods`.
        calibration_tokens: how many tokens of the text are used, picked from all over it.
        sequence_length: tokens a sequence; lowered to what the model allows.
        seed: of that choice and of the solver.
        resume: folder that keeps finished blocks, so that an interrupted run goes on where it stopped.

    Returns:
        The correction, attached to `model`, its factors in the model's dtype on the CPU.

    Raises:
        UnsupportedModuleError: the model holds no quantized linear module, or none that can be corrected.
        ReferenceMismatchError: modules or shapes of the reference are others.
        CalibrationError: no text, or fewer tokens than needed.
        RankError: rank below 1, or larger than every group allows.
        NonFiniteError: NaN or Inf in a weight or in an activation; the message names the module.
    """
    solver = get_method(method)
    if rank is not None and budget is not None:
        raise ConfigError("give either rank or budget, not both.")
    if attached(model):
        raise ConfigError("the model carries a correction already; call glowq.detach(model) first.")
    backends = prepare_model(model)
    if not backends:
        raise UnsupportedModuleError(
            f"{type(model).__name__} holds no quantized linear module: there is nothing to correct. Quantize it first, "
            "for example with GlowQConfig(base='nf4')."
        )
    sequences = _sequences(model, calibration, tokenizer, calibration_tokens, sequence_length, seed)
    trace = _trace(model, sequences)
    groups = trace.groups
    base_bytes = sum(backend.packed_bytes(model.get_submodule(name)) for name, backend in backends.items())
    ranks = _ranks(groups, rank, budget, base_bytes, _factor_dtype(model), shared=solver.shared)
    _check_token_count(sequences, ranks)
    config = _stored_config(model, reference, base_bytes, solver, sequences, seed)
    try:
        with Reference(reference, type(model)) as source:
            store = Resume.open(resume, config, reference, ranks, sequences)
            run = _Run(model, source, backends, solver, ranks, seed, store)
            factors = run.solve(_stops(trace), sequences)
    except BaseException:
        detach(model)
        raise
    config = config.with_groups(describe_groups(factors))
    correction = Correction(
        factors=factors,
        config=config,
        model_config=_model_config(model),
        base_bytes=base_bytes,
        tokenizer=tokenizer,
        generation_config=getattr(model, "generation_config", None),
    )
    from .integrations.transformers import adopt

    adopt(model, config)
    return correction


class _Run:
    """The walk of one `correct` call."""

    def __init__(
        self,
        model: nn.Module,
        reference: Reference,
        backends: Mapping[str, Backend],
        method: Method,
        ranks: Mapping[str, int],
        seed: int,
        resume: Resume,
    ) -> None:
        self.model = model
        self.reference = reference
        self.backends = backends
        self.method = method
        self.ranks = ranks
        self.seed = seed
        self.resume = resume

    def solve(self, stops: Mapping[str, Sequence[Group]], sequences: Tensor) -> list[GroupFactors]:
        """Factors of every group in the order of the walk; each block is corrected before the next one is measured."""
        solved: list[GroupFactors] = []
        inputs = [_to_model(batch, self.model) for batch in batches(sequences, _batch_size(sequences))]
        work = len(inputs) * len(stops) if self.method.statistic != "none" else len(stops)
        bar = progress(total=work, desc="Correcting", unit="block")
        with bar, BlockWalk(self.model, inputs, list(stops)) as walk:
            for stop, members in stops.items():
                done = self.resume.load(stop, members)
                if done is None:
                    done = self._solve_block(walk, stop, members, bar)
                    self.resume.save(stop, done)
                else:
                    bar.update(len(inputs))
                for entry in done:
                    attach(self.model, entry)
                solved.extend(done)
        return solved

    def _solve_block(self, walk: BlockWalk, stop: str, groups: Sequence[Group], bar: Any) -> list[GroupFactors]:
        errors = {group.name: self._error(group) for group in groups}
        moments = dict.fromkeys(errors, Moments(tokens=0))
        if self.method.statistic == "none":
            bar.update()
        else:
            collectors = [self._collector(group, errors[group.name]) for group in groups]
            for _ in walk.collect(stop, collectors):
                bar.update()
            moments = {collector.group.name: collector.moments() for collector in collectors}
        solved: list[GroupFactors] = []
        for group in groups:
            solved.extend(self._factors(group, errors[group.name], moments[group.name], _factor_dtype(self.model)))
        return solved

    def _collector(self, group: Group, error: Tensor) -> MomentCollector:
        narrow = sum(group.out_features) < group.in_features  # then E S E^T is smaller than S
        return MomentCollector(group, self.method.statistic, error if narrow else None)

    def _error(self, group: Group) -> Tensor:
        """Stacked weight error E = W - Q of the group, shape (O, d), float32."""
        rows = []
        for name, width in zip(group.members, group.out_features, strict=True):
            quantized = read_weight(self.backends[name], name, self.model.get_submodule(name))
            full = self.reference.weight(name, (width, group.in_features))
            rows.append(full.to(quantized.device) - quantized)
        return torch.cat(rows)

    def _factors(self, group: Group, error: Tensor, moments: Moments, dtype: torch.dtype) -> list[GroupFactors]:
        parts = [(group, error, moments)] if self.method.shared else list(_members(group, error, moments))
        solved = []
        for part, part_error, part_moments in parts:
            rank = min(self.ranks[group.name], part_error.shape[0], part_error.shape[1])
            result = self.method.solve(part_error, part_moments, rank, self.seed)
            lefts = result.left.to(dtype).cpu().split(list(part.out_features))
            solved.append(
                GroupFactors(
                    part,
                    result.right.to(dtype).cpu(),
                    {member: left.contiguous() for member, left in zip(part.members, lefts, strict=True)},
                    result.gains.cpu(),
                )
            )
        return solved


def _members(group: Group, error: Tensor, moments: Moments) -> Any:
    """Each member as a group of one, for methods that share nothing."""
    start = 0
    for name, width in zip(group.members, group.out_features, strict=True):
        single = Group(name, (name,), group.in_features, (width,), group.block)
        yield single, error[start : start + width], moments.rows(start, start + width)
        start += width


def _stops(trace: Trace) -> dict[str, list[Group]]:
    """Where the walk pauses -> the groups measured until there, in the order of the calls."""
    if trace.repeated:
        return {"": trace.groups}  # a block that runs again cannot be corrected before it is measured: all at once
    stops: dict[str, list[Group]] = {}
    for group in trace.groups:
        stops.setdefault(group.block, []).append(group)
    return stops


def _sequences(model: nn.Module, calibration: Any, tokenizer: Any, tokens: int, length: int, seed: int) -> Tensor:
    config = getattr(model, "config", None)
    text_config = config.get_text_config() if config is not None else None
    vocab_size = getattr(text_config, "vocab_size", None)
    limit = getattr(text_config, "max_position_embeddings", None) or length
    if isinstance(calibration, Tensor):
        if calibration.dim() != 2 or calibration.is_floating_point() or calibration.numel() == 0:
            raise CalibrationError(
                f"calibration token ids must be whole numbers of shape (n, length), found {calibration.dtype} of shape "
                f"{tuple(calibration.shape)}."
            )
        if vocab_size is not None and int(calibration.max()) >= vocab_size:
            raise TokenizerMismatchError(
                f"the calibration tokens hold id {int(calibration.max())}, the model knows 0 to {vocab_size - 1}; "
                "use the model's own tokenizer."
            )
        return calibration
    if calibration is None:
        raise CalibrationError("no calibration text: pass calibration= a list of str, a file, or a datasets name.")
    if tokenizer is None:
        raise CalibrationError("calibration text needs a tokenizer: pass tokenizer=AutoTokenizer.from_pretrained(...).")
    return token_sequences(
        read_texts(calibration), tokenizer, length=min(length, limit), limit=tokens, seed=seed, vocab_size=vocab_size
    )


def _trace(model: nn.Module, sequences: Tensor) -> Trace:
    example = _to_model({"input_ids": sequences[:1, :_TRACE_TOKENS]}, model)
    trace = trace_groups(model, example)
    if not trace.groups:
        name, reason = next(iter(trace.skipped.items()))
        raise UnsupportedModuleError(f"no module can be corrected; {name}: {reason}.")
    return trace


def _ranks(
    groups: Sequence[Group],
    rank: int | None,
    budget: str | int | None,
    base_bytes: int,
    dtype: torch.dtype,
    *,
    shared: bool,
) -> dict[str, int]:
    largest = {group.name: min(sum(group.out_features), group.in_features) for group in groups}
    if budget is not None:
        size = torch.empty((), dtype=dtype).element_size()
        rank = uniform_rank(sum(_rank_values(group, shared) for group in groups) * size, budget, base_bytes)
        rank = min(rank, max(largest.values()))
    rank = 32 if rank is None else rank
    if rank < 1 or rank > max(largest.values()):
        raise RankError(f"rank must lie between 1 and {max(largest.values())} for this model, found {rank}.")
    return {name: min(rank, most) for name, most in largest.items()}


def _rank_values(group: Group, shared: bool) -> int:
    return sum(group.out_features) + group.in_features * (1 if shared else len(group.members))


def _check_token_count(sequences: Tensor, ranks: Mapping[str, int]) -> None:
    needed = 2 * max(ranks.values())
    if sequences.numel() < needed:
        raise CalibrationError(
            f"{sequences.numel()} calibration tokens are too few for rank {max(ranks.values())}: at least {needed} are "
            "needed, and some ten thousand are better. Give longer text or a smaller rank."
        )


def _batch_size(sequences: Tensor) -> int:
    return max(1, _BATCH_TOKENS // sequences.shape[1])


def _to_model(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    embeddings = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else model
    device = next(iter(embeddings.parameters())).device
    return dict(batch) if device.type == "meta" else {name: value.to(device) for name, value in batch.items()}


def _factor_dtype(model: nn.Module) -> torch.dtype:
    dtype = getattr(model, "dtype", torch.float32)
    return dtype if dtype.is_floating_point and dtype.itemsize >= 2 else torch.bfloat16


def _stored_config(
    model: nn.Module,
    reference: Any,
    base_bytes: int,
    method: Method,
    sequences: Tensor,
    seed: int,
) -> GlowQConfig:
    base = getattr(getattr(model, "config", None), "quantization_config", None)
    name, revision = base_identity(model, reference)
    return GlowQConfig(
        base=base.base if isinstance(base, GlowQConfig) else base,
        method=method.name,
        seed=seed,
        format="correction",
        base_model={"name": name, "revision": revision, "fingerprint": fingerprint(model)},
        groups={},
        base_bytes=base_bytes,
        provenance={
            "glowq": __version__,
            "calibration_tokens": int(sequences.numel()),
            "sequence_length": int(sequences.shape[1]),
        },
    )


def base_identity(model: nn.Module, reference: Any) -> tuple[str, str | None]:
    """Where the base can be loaded from again: the quantized model's own folder or Hub name, and the cached commit."""
    config: Any = getattr(model, "config", None)
    earlier = getattr(config, "quantization_config", None)
    if isinstance(earlier, GlowQConfig) and earlier.base_model is not None:
        # Loaded with a correction that was detached: its folder is no base.
        return earlier.base_model["name"], earlier.base_model["revision"]
    name = getattr(config, "_name_or_path", "") or (reference if isinstance(reference, str) else "")
    if not name:
        raise ConfigError("the model does not know where it was loaded from; load it with from_pretrained.")
    if Path(name).is_dir():
        return str(Path(name).resolve()), None
    cached = try_to_load_from_cache(str(name), "config.json")
    return str(name), Path(cached).parent.name if isinstance(cached, str) else None


def _model_config(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    stored = dict(config.to_dict())
    stored.pop("quantization_config", None)
    stored.pop("_name_or_path", None)
    stored["architectures"] = [type(model).__name__]
    return stored
