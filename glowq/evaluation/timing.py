"""What a correction costs at run time: the base, the correction, and one right factor a module, timed in turns."""

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
from ..factors.rounding import rounded
from ..runtime.attach import attach, attached_factors, detach
from ..utils.logging import progress

__all__ = ["Shape", "machine", "measure", "per_module", "variants"]

_WARM_UP = 3  # steps


@dataclass(frozen=True)
class Shape:
    """What is timed: `batch` prompts of `length` tokens, and as many decoded tokens as `measure` is asked for."""

    batch: int
    length: int


def per_module(factors: Sequence[GroupFactors]) -> list[GroupFactors]:
    """The same correction with a right factor of its own for each member, as QERA, EoRA and LoRA adapters have it."""
    return [
        replace(entry, group=single, right=entry.right.clone(), lefts={member: entry.lefts[member]})
        for entry in factors
        for single in entry.group.apart()
        for member in single.members
    ]


def variants(model: nn.Module, *, int8: bool = False) -> dict[str, nn.Module]:
    """The base, the corrected model, and the one with a right factor a module: three models that share their weights.

    Args:
        model: carries a correction, and is the second of the three.
        int8: add the last two with their factors rounded to int8.

    Raises:
        ConfigError: the model carries no correction, or one whose factors are in int8 already.
    """
    factors = attached_factors(model)
    if not factors:
        raise ConfigError("the model carries no correction, so that there is nothing to time; give a folder with one.")
    if int8 and all(entry.int8 for entry in factors):
        raise ConfigError("the correction's factors are in int8 already: leave out --int8, they are timed as they are.")
    single = per_module(factors)
    found = {"base": _twin(model, ()), "shared": model, "per module": _twin(model, single)}
    if int8:
        for name, several in (("shared", factors), ("per module", single)):
            found[f"{name}, int8"] = _twin(model, [rounded(entry) for entry in several])
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
    """Time every model on random tokens, one prompt and one decoded token each in turns.

    Args:
        models: what `variants` returned.
        shapes: batch sizes and prompt lengths.
        base_bytes: of the quantized weights, as the correction's config states them.
        new_tokens: tokens decoded after each prompt; 0 for models that decode none.
        repeats: prompts of each shape.
        compiled: run torch.compile's graphs with a static cache.
        seed: of the tokens.

    Returns:
        One row a shape and model. Times are (lower quartile, median, upper quartile) in seconds: "first_token" of a
        whole prompt, "decode" of one step; "..._added" is the difference from the base in the same turn, and
        "..._overhead" its median as a share of the base's. "factor_bytes" and "byte_ratio" (of the quantized weights)
        are what has to be read besides; "peak_bytes" is the process's, or the accelerator's, without the factors of
        the others.

    Raises:
        ConfigError: the model is an encoder with a decoder.
    """
    import torch._dynamo.config as compiler

    sizes = {name: sum(entry.factor_bytes for entry in attached_factors(model)) for name, model in models.items()}
    runners = {name: _Runner(model, compiled) for name, model in models.items()}
    if not next(iter(runners.values())).decodes:
        new_tokens = 0
    rows = []
    # Every model has graphs of its own, of one class's code: more than a compiler takes for a sign of trouble.
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
    """What the figures hold for: processor or accelerator, threads, and torch's version."""
    device = next(model.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "dtype": str(getattr(model, "dtype", None)).removeprefix("torch."),
    }


class _Runner:
    """One model, its prompt and its decode step."""

    def __init__(self, model: Any, compiled: bool) -> None:
        if model.config.is_encoder_decoder:
            raise ConfigError("only decoders and encoders are timed; this model is an encoder with a decoder.")
        self.config = model.config.get_text_config()
        self.device = next(model.parameters()).device
        self.decodes = bool(model.can_generate())
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        self.static = compiled and self.decodes
        mode = "reduce-overhead" if self.device.type == "cuda" else None
        self.call: Callable[..., Any] = torch.compile(model, fullgraph=True, mode=mode) if compiled else model

    def prompt(self, ids: Tensor, room: int) -> Any:
        """Read a prompt; returns its cache, which has room for more tokens."""
        if not self.decodes:
            return self.call(input_ids=ids)
        cache = self._cache(ids.shape[1] + room)
        self.step(ids, cache)
        return cache

    def step(self, ids: Tensor, cache: Any) -> None:
        """Read more tokens of each sequence into the cache."""
        self.call(input_ids=ids, past_key_values=cache, use_cache=True, **self.options)

    def _cache(self, length: int) -> Any:
        from transformers import DynamicCache, StaticCache

        return StaticCache(self.config, max_cache_len=length) if self.static else DynamicCache(config=self.config)


def _timed(
    runners: Mapping[str, _Runner], shape: Shape, new_tokens: int, repeats: int, seed: int, done: Callable[[], Any]
) -> tuple[Tensor, Tensor, list[int | None]]:
    """Seconds of every prompt (repeats, models), of every decoded token (repeats x new_tokens, models), and peaks."""
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
    """Everybody's turn comes first, second and last equally often."""
    return [(turn + place) % count for place in range(count)]


class _clock:
    """Write what a block takes, to the end of its work on the device, into `seconds[index]`."""

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
    """Most memory in use inside this block: on the accelerator, or of the process where Linux tells; else None."""
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


def _twin(model: nn.Module, factors: Sequence[GroupFactors]) -> nn.Module:
    """A model of its own with the same tensors, and another correction."""
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())})
    detach(twin)
    for entry in factors:
        attach(twin, entry)
    return twin


def _processor() -> str:
    """The processor's name as Linux gives it, else as Python knows it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {psutil.cpu_count(logical=False)} cores"
