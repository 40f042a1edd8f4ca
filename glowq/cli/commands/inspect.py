"""`glowq inspect`: show what a model or correction is and what can be corrected, without reading its weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..options import JsonOption, ModelArgument
from ..output import grid, session

if TYPE_CHECKING:
    from ...models.headers import Headers
    from ...selection.allocation import GroupGains

__all__ = ["inspect"]

_DEQUANTIZED = ("fp8", "mxfp4")  # transformers can dequantize these while loading
_CURVE = "predicted share of the quantization loss that a cut to these bytes recovers"
_PARTS = {
    "correctable": "can be corrected",
    "skipped": "quantized, cannot be corrected",
    "not_quantized": "not quantized",
}
_APART = frozenset(  # of the rows of the first table
    {"groups", "curve", "times_predicted", "schemes", "modules", "correctable", "skipped", "coverage", "note", "next"}
)
_WIDEST = 80  # characters of the longest setting that the table shows


def inspect(model: ModelArgument, json: JsonOption = False) -> None:
    """Show what a model or correction is, and what can be corrected, without loading it.

    \b
    Examples:
      glowq inspect org/model-gptq
      glowq inspect corrected
    """
    with session(json) as show:
        from ...models.headers import read_headers

        headers = read_headers(model)
        stored = headers.config.get("quantization_config")
        result: dict[str, Any] = {
            "model": model,
            "kind": "plain" if stored is None else "quantized",
            "architecture": (headers.config.get("architectures") or [None])[0],
            "dtype": headers.config.get("dtype", headers.config.get("torch_dtype")),
            "file_bytes": sum(headers.sizes.values()),
        }
        if headers.gguf:
            result.update(_gguf(model, headers.gguf))
        elif headers.hqq:
            result.update(_hqq())
        elif stored is None:
            result.update(_plain(model, headers))
        elif stored.get("quant_method") != "glowq":
            result.update(_quantized(model, headers, stored))
        else:
            result.update(_correction(model, stored, headers))
        show(result, lambda: _tables(result))


def _base(settings: Mapping[str, Any] | None, found: Any = None) -> dict[str, Any] | None:
    """The quantizer of a model, and the library that glowq needs for it."""
    from ...quantizers.registry import backend_of, is_installed, method_of

    if settings is None:
        return None
    method, backend = method_of(settings), backend_of(settings)
    schemes = list(found.schemes.values()) if found is not None else []
    if schemes:  # bitsandbytes has two kinds of modules, and so two backends
        backend = next(iter(found.backends.values()))
    return {
        "quant_method": method,
        "backend": None if backend is None else backend.name,
        "library": None if backend is None else backend.package,
        "extra": None if backend is None else backend.extra or None,
        "installed": None if backend is None else is_installed(backend),
        "bits": _same(scheme.bits for scheme in schemes),
        "group_size": _same(scheme.group_size for scheme in schemes),
        "settings": settings,
    }


def _same(values: Any) -> Any:
    """The value that all of `values` are equal to, or None if they differ."""
    found = set(values)
    return found.pop() if len(found) == 1 else None


def _schemes(schemes: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "scheme": str(scheme),
            "format": scheme.format,
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "details": list(scheme.details),
            "modules": count,
        }
        for scheme, count in Counter(schemes.values()).items()
    ]


def _found(model: str, headers: Headers, settings: Mapping[str, Any] | None, refusal: str | None) -> dict[str, Any]:
    from ...artifact.coverage import in_words
    from ...models.candidates import find_candidates

    found = find_candidates(model, headers, settings, refusal)
    return {
        "base": _base(settings, found),
        "schemes": _schemes(found.schemes),
        "modules": {name: str(scheme) for name, scheme in found.schemes.items()},
        "correctable": found.correctable,
        "skipped": found.skipped,
        "coverage": in_words(found.sizes, _PARTS),
        "note": found.note,
    }


def _plain(model: str, headers: Headers) -> dict[str, Any]:
    advice = (
        f"not quantized: name a quantizer, for example glowq correct {model} --base nf4 --calibration FILE --output "
        "OUT; or --base dense with --reference, if its float weights hold quantized values."
    )
    return {**_found(model, headers, None, None), "next": advice}


def _quantized(model: str, headers: Headers, settings: Mapping[str, Any]) -> dict[str, Any]:
    refusal = _refusal(model, settings)
    result = _found(model, headers, settings, refusal)
    command = f"glowq correct {model} --reference REF --calibration FILE --output OUT"
    if refusal is not None:
        advice = refusal
    elif not result["correctable"]:
        advice = "no module of it can be corrected, for the reasons given."
    elif not result["base"]["installed"]:
        advice = f"needs {result['base']['library']}: pip install 'glowq[{result['base']['extra']}]', then {command}"
    else:
        advice = command
    return {**result, "next": advice}


def _refusal(model: str, settings: Mapping[str, Any]) -> str | None:
    """Why glowq cannot correct the quantized modules of a model, and what the user can do; None if glowq can."""
    from ...quantizers.registry import backend_of, method_of, methods

    method, dense = method_of(settings), f"glowq correct {model} --base dense --reference REF"
    if backend_of(settings) is not None:
        return None
    if method in _DEQUANTIZED:
        return f"{method} is corrected once transformers has dequantized it on load: {dense}"
    return (
        f"glowq reads no {method!r} weights (it reads {', '.join(methods())}); if transformers can dequantize them on "
        f"load, {dense}; otherwise quantize the full-precision model with another quantizer."
    )


def _gguf(model: str, files: tuple[str, ...]) -> dict[str, Any]:
    folder = Path(model).parent if Path(model).is_file() else model
    advice = (
        "GGUF is corrected once transformers has dequantized it on load: "
        f"glowq correct {folder} --gguf-file {files[0]} --base dense --reference REF --calibration FILE --output OUT"
    )
    return {**_unread("gguf"), "kind": "gguf", "files": list(files), "next": advice}


def _hqq() -> dict[str, Any]:
    from ...quantizers.loading.hqq import LOAD

    advice = f"HQQ saved its weights as a pickle, which can run code and which glowq does not read; {LOAD}."
    return {**_unread("hqq"), "kind": "quantized", "next": advice}


def _unread(method: str) -> dict[str, Any]:
    return {
        "base": _base({"quant_method": method}),
        "schemes": [],
        "modules": {},
        "correctable": [],
        "skipped": {},
        "coverage": None,
        "note": None,
    }


def _correction(model: str, stored: dict[str, Any], headers: Headers) -> dict[str, Any]:
    from ...artifact.coverage import covered
    from ...artifact.factor_headers import read_stored
    from ...selection.curve import budget_curve

    config, factors = read_stored(model, headers)
    group_gains = factors.group_gains
    groups = [_group(item, (config.groups or {})[item.group.name]) for item in group_gains]
    curve = budget_curve(group_gains, config.total, config.base_bytes or 0)
    # Only a full model has quantized modules: a correction's base is another model, and dense weights are floats.
    base = stored.get("base") or {}
    whole = config.format == "full" and base.get("quant_method") != "dense"
    found = _found(model, headers, base, None) if whole else {"base": _base(base)}
    return {
        "kind": config.format,
        "version": config.version,
        **found,
        "base_model": config.base_model,
        "base_bytes": config.base_bytes,
        "factor_bytes": factors.factor_bytes,
        "overhead": factors.factor_bytes / config.base_bytes if config.base_bytes else None,
        "method": config.method,
        "seed": config.seed,
        "coverage": covered(config.provenance.coverage, (item.group for item in group_gains)),
        "provenance": config.provenance.to_dict(),
        "curve": [asdict(point) for point in curve],
        "times_predicted": config.provenance.times_predicted(curve[-1].predicted if curve else None),
        "groups": groups,
    }


def _group(item: GroupGains, stored: Mapping[str, Any]) -> dict[str, Any]:
    size, parameters = item.rank_bytes * len(item.gains), stored["rank"] * sum(item.group.widths)
    return {"name": item.group.name, "bytes": size, "parameters": parameters, **stored, "gain": sum(item.gains)}


def _tables(result: dict[str, Any]) -> Any:
    from rich.console import Group
    from rich.table import Table

    apart = (
        "groups",
        "curve",
        "times_predicted",
        "schemes",
        "modules",
        "correctable",
        "skipped",
        "coverage",
        "note",
        "next",
    )
    facts = {key: value for key, value in result.items() if key not in apart}
    if "correctable" in result and result["kind"] != "gguf":
        facts["quantized modules"] = len(result["modules"])
        facts["can be corrected"] = len(result["correctable"])
    facts = _flat(facts)
    if result.get("coverage") and result["kind"] != "plain":
        facts["weights, by bytes"] = "; ".join(result["coverage"]["text"])
    shown = [grid(facts)]
    if result.get("schemes"):
        table = Table("scheme", "bits", "modules")
        for scheme in result["schemes"]:
            table.add_row(scheme["scheme"], f"{scheme['bits']:g}", str(scheme["modules"]))
        shown.append(table)
    if result.get("skipped"):
        shown.append(_skipped(result["skipped"]))
    if result.get("groups"):
        shown.append(_groups(result["groups"], result["provenance"].get("gains", "squared output")))
    if result.get("curve"):
        shown.append(_curve(result["curve"], result["times_predicted"]))
    return Group(*shown, *(f"{key}: {result[key]}" for key in ("note", "next") if result.get(key)))


def _skipped(skipped: Mapping[str, str]) -> Any:
    """A table with one row per reason, because in a large model one reason can apply to hundreds of modules."""
    from rich.table import Table

    table = Table("modules", "not corrected", "because", title="left out", title_justify="left")
    for reason in dict.fromkeys(skipped.values()):
        names = [name for name, found in skipped.items() if found == reason]
        table.add_row(str(len(names)), names[0] if len(names) == 1 else f"{names[0]}, ...", reason)
    return table


def _groups(groups: list[dict[str, Any]], unit: str) -> Any:
    from rich.table import Table

    table = Table("group", "rank", "in", "out", "bytes", f"gain ({unit})")
    for group in groups:
        out = " + ".join(map(str, group["out_features"]))
        numbers = (group["rank"], group["in_features"], out, f"{group['bytes']:,}", f"{group['gain']:.4g}")
        table.add_row(group["name"], *map(str, numbers))
    return table


def _curve(points: list[dict[str, Any]], times: float | None) -> Any:
    from rich.table import Table

    table = Table("bytes", "% of base", "predicted share recovered", title=_CURVE, title_justify="left")
    if times is not None:
        table.add_column("to expect, as the whole was measured")
    for point in points:
        expected = [] if times is None else [f"{min(1.0, times * point['predicted']):.1%}"]
        row = f"{point['bytes']:,}", f"{100 * point['share_of_base']:.3g}", f"{point['predicted']:.1%}"
        table.add_row(*row, *expected)
    return table


def _flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Rows for the table. Nested settings become "base.bits"; private, empty and very long ones are left out."""
    rows: dict[str, str] = {}
    for key, value in facts.items():
        if isinstance(value, dict) and (prefix == "base.settings." or key in ("not_restored", "coverage")):
            continue  # too many values for the table; --json prints all of them
        if isinstance(value, dict):
            rows.update(_flat(value, f"{prefix}{key}."))
        elif (value is not None and not key.startswith("_") and len(str(value)) <= _WIDEST) or key == "model":
            form = ".2%" if key == "overhead" else "," if key.endswith("_bytes") else ""
            rows[prefix + key] = format(value, form) if form else str(value)
    return rows
