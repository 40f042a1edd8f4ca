"""Time three models in turns: the base, the corrected one, and the same correction with a right factor per module."""

from __future__ import annotations

import copy
import inspect
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..factors.factors import GroupFactors
from ..factors.form import bits_of
from ..factors.rounding import round_group
from ..runtime.attach import attach, attached_factors, detach
from ..utils.logging import progress

__all__ = [
    "Shape",
    "machine",
    "measure",
    "per_module",
    "processor",
    "variants",
]

_WARM_UP = 3  # steps


@dataclass(frozen=True)
class Shape:
    """Shape of the prompts to time: `batch` prompts of `length` tokens each."""

    batch: int
    length: int


def per_module(factors: Sequence[GroupFactors]) -> list[GroupFactors]:
    """Return the same correction with a separate right factor for each member, as in QERA, EoRA and LoRA adapters."""
    return [
        replace(entry, group=single, right=entry.right.clone(), lefts={member: entry.lefts[member]})
        for entry in factors
        for single in entry.group.apart()
        for member in single.members
    ]


def variants(model: nn.Module, *, factor_dtype: str = "auto") -> dict[str, nn.Module]:
    """Return three models that share their weights: the base, the corrected one, one with a right factor per module.

    Args:
        model: model with a correction; it becomes the second of the three.
        factor_dtype: also add the last two with their factors rounded to this, unless it is "auto".

    Raises:
        ConfigError: the model carries no correction, or its factors have as few bits as `factor_dtype` already.
    """
    factors = attached_factors(model)
    if not factors:
        raise ConfigError("the model carries no correction, so that there is nothing to time; give a folder with one.")
    bits = bits_of(factor_dtype)
    if bits is not None and any(entry.bits is not None and entry.bits <= bits for entry in factors):
        raise ConfigError(
            f"the correction's factors have no more bits than {factor_dtype}: leave out --factor-dtype, they are timed "
            "as they are."
        )
    single = per_module(factors)
    found = {"base": _copy_with(model, ()), "shared": model, "per module": _copy_with(model, single)}
    if bits is not None:
        for name, several in (("shared", factors), ("per module", single)):
            found[f"{name}, {factor_dtype}"] = _copy_with(model, [round_group(entry, bits) for entry in several])
    return found


@torch.no_grad()
def measure(
    models: Mapping[str, nn.Module],
    shapes: Sequence[Shape],
    base_bytes: int,
    *,
    new_tokens: int = 32,
    repeats: int = 5,
    compiled: bool = False,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Time every model on random tokens. The models take turns after every prompt and every decoded token.

    Args:
        models: what `variants` returned.
        shapes: batch sizes and prompt lengths.
        base_bytes: bytes of the quantized weights, as stored in the correction's config.
        new_tokens: number of tokens to decode after each prompt; models that do not generate decode none.
        repeats: number of prompts of each shape.
        compiled: whether to compile the models with torch.compile and to use a static cache.
        seed: seed of the tokens.

    Returns:
        One row per shape and model. Times are (lower quartile, median, upper quartile) in seconds: "first_token" for a
        whole prompt, "decode" for one step. "..._added" is the difference from the base in the same turn, and
        "..._overhead" is its median as a share of the base's median. "factor_bytes" are the bytes of the factors, which
        a forward reads in addition to the weights, and "byte_ratio" is their share of `base_bytes`. "peak_bytes" is the
        peak memory of the accelerator or of the process, without the factors of the other models.

    Raises:
        ConfigError: the model is an encoder with a decoder.
    """
    import torch._dynamo.config as compiler

    sizes = {name: sum(entry.factor_bytes for entry in attached_factors(model)) for name, model in models.items()}
    runners = {name: _Runner(model, compiled) for name, model in models.items()}
    if not next(iter(runners.values())).decodes:
        new_tokens = 0
    rows = []
    # The models share the code of one class, and each needs its own graphs of it: the compiler's limit is too low.
    graphs = compiler.recompile_limit + 4 * len(models) * len(shapes)
    with (
        compiler.patch(recompile_limit=graphs),
        progress(total=len(shapes) * repeats, desc="Timing", unit="prompt") as bar,
    ):
        for shape in shapes:
            prompts, decodes, peaks = _timed(runners, shape, new_tokens, repeats, seed, bar.update)
            for index, name in enumerate(models):
                row: dict[str, Any] = {"model": name, "batch": shape.batch, "length": shape.length}
                row |= _figures("first_token", prompts, index, shape.batch * shape.length)
                row |= _figures("decode", decodes, index, shape.batch) if new_tokens else {}
                peak, others = peaks[index], sum(sizes.values()) - sizes[name]
                row |= {"factor_bytes": sizes[name], "byte_ratio": sizes[name] / base_bytes}
                rows.append({**row, "peak_bytes": None if peak is None else peak - others})
    return rows


def machine(model: nn.Module) -> dict[str, Any]:
    """Describe what the times depend on: processor or accelerator, threads, torch's version, platform and dtype."""
    device = next(model.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "dtype": str(getattr(model, "dtype", None)).removeprefix("torch."),
    }


class _Runner:
    """Runs the prompts and the decode steps of one model."""

    def __init__(self, model: Any, compiled: bool) -> None:
        if model.config.is_encoder_decoder:
            raise ConfigError("only decoders and encoders are timed; this model is an encoder with a decoder.")
        self.config = model.config.get_text_config()
        self.device = next(model.parameters()).device
        self.decodes = bool(model.can_generate())
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT passes options on
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(inner.forward).parameters else {}
        self.static = compiled and self.decodes
        mode = "reduce-overhead" if self.device.type == "cuda" else None
        self.call: Callable[..., Any] = torch.compile(model, fullgraph=True, mode=mode) if compiled else model

    def prompt(self, ids: Tensor, extra: int) -> Any:
        """Run a prompt, and return its cache with space for `extra` more tokens."""
        if not self.decodes:
            return self.call(input_ids=ids)
        cache = self._cache(ids.shape[1] + extra)
        self.step(ids, cache)
        return cache

    def step(self, ids: Tensor, cache: Any) -> None:
        """Run more tokens of each sequence, which are added to the cache."""
        self.call(input_ids=ids, past_key_values=cache, use_cache=True, **self.options)

    def _cache(self, length: int) -> Any:
        from transformers import DynamicCache, StaticCache

        return StaticCache(self.config, max_cache_len=length) if self.static else DynamicCache(config=self.config)


def _timed(
    runners: Mapping[str, _Runner], shape: Shape, new_tokens: int, repeats: int, seed: int, done: Callable[[], Any]
) -> tuple[Tensor, Tensor, list[int | None]]:
    """Time all models for one shape.

    Returns:
        Seconds of every prompt, shape (repeats, models); seconds of every decoded token, shape (repeats * new_tokens,
        models); and the peak bytes of every model.
    """
    running = list(runners.values())
    generator = torch.Generator().manual_seed(seed)
    tokens = (shape.batch, shape.length + new_tokens)
    ids = torch.randint(running[0].config.vocab_size, tokens, generator=generator).to(running[0].device)
    prompt, later = ids[:, : shape.length], ids[:, shape.length :].unbind(1)
    peaks = []
    for runner in running:
        with _peak(runner.device) as peak:
            cache = runner.prompt(prompt, len(later))
            for step in later[:_WARM_UP]:
                runner.step(step[:, None], cache)
        peaks.append(peak())
    del cache
    prompts = torch.zeros(repeats, len(running), dtype=torch.float64)
    decodes = torch.zeros(repeats * new_tokens, len(running), dtype=torch.float64)
    for turn in range(repeats):
        caches: list[Any] = [None] * len(running)
        for index in _order(turn, len(running)):
            with _clock(running[index].device, prompts[turn], index):
                caches[index] = running[index].prompt(prompt, len(later))
        for at in range(new_tokens):
            for index in _order(turn + at, len(running)):
                with _clock(running[index].device, decodes[turn * new_tokens + at], index):
                    running[index].step(later[at][:, None], caches[index])
        done()
    return prompts, decodes, peaks


def _figures(kind: str, seconds: Tensor, index: int, tokens: int) -> dict[str, Any]:
    added = seconds[:, index] - seconds[:, 0]
    (_, base, _), (_, median, _) = _quartiles(seconds[:, 0]), _quartiles(seconds[:, index])
    return {
        kind: _quartiles(seconds[:, index]),
        f"{kind}_tokens_per_second": tokens / median,
        f"{kind}_added": _quartiles(added),
        f"{kind}_overhead": _quartiles(added)[1] / base,
    }


def _quartiles(seconds: Tensor) -> list[float]:
    return torch.quantile(seconds, torch.tensor([0.25, 0.5, 0.75], dtype=seconds.dtype)).tolist()


def _order(turn: int, count: int) -> list[int]:
    """Return the order of one turn. Over all turns, each model comes first, second and last equally often."""
    return [(turn + place) % count for place in range(count)]


class _clock:
    """Context manager that writes its duration, to the end of the work on the device, into `seconds[index]`."""

    def __init__(self, device: torch.device, seconds: Tensor, index: int) -> None:
        self.device, self.seconds, self.index = device, seconds, index

    def __enter__(self) -> None:
        self._wait()
        self.start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._wait()
        self.seconds[self.index] = time.perf_counter() - self.start

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


@contextmanager
def _peak(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """Yield a function that returns the peak memory inside this context.

    It is the peak on a CUDA device, or else the peak of the process on Linux, or else None.
    """
    found: list[int | None] = [None]
    reset = Path("/proc/self/clear_refs")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif reset.exists():
        reset.write_text("5")
    yield lambda: found[0]
    if device.type == "cuda":
        found[0] = torch.cuda.max_memory_allocated(device)
    elif reset.exists():
        status = Path("/proc/self/status").read_text()
        found[0] = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def _copy_with(model: nn.Module, factors: Sequence[GroupFactors]) -> nn.Module:
    """Copy a model without copying its tensors, and attach another correction to the copy."""
    copied = copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})
    detach(copied)
    for entry in factors:
        attach(copied, entry)
    return copied


def processor() -> str:
    """Return the processor's name, from Linux or else from Python, and its number of cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {psutil.cpu_count(logical=False)} cores"
