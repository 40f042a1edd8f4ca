"""What works of a model type: quantize, correct, compare with dense algebra, generate, save and load again.

`make architectures` runs this for all types, and writes the table of examples/guides/architectures.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import glowq
from glowq.models.reference import Reference
from glowq.quantizers.model import quantized_modules
from glowq.runtime.attach import attached, attached_factors
from support import shrunk
from support.shrunk import auto_class, inputs_of, save_shrunk, shrunk_config
from support.tiny import TEXTS

__all__ = ["BASES", "NotRunnable", "cell", "examined", "types"]

BASES = ["nf4", "torchao-int4"]
_LARGEST = 3e7  # parameters; a type whose default config stays larger with small sizes is left out
_SECONDS = 90  # for each type and base
_SAMPLES = 12
_ENDLESS = ("fastspeech2_conformer", "fastspeech2_conformer_with_hifigan")  # random weights give gigabytes of sound
_GUIDE = """\
# Model types

`make architectures` makes a tiny random model of every model type that transformers has. It quantizes and corrects the
model, compares every corrected output with dense algebra in float64, checks that B x is computed at most once for each
call of a group, generates, saves the model in both forms, and loads both again. This is the table that its last run
wrote, with transformers {version}. A cell: the number of groups, and the share of the values of all matrices, without
embeddings, that is corrected. The rest is in float: the head, which is large in a tiny model, and what the base does
not quantize, such as a mixture's experts that are one parameter.

{counts}
"not by the base": the base alone cannot load, run or reload a model of that type with sizes this small, or quantizes
none of the modules that the sample reaches, which says little about large ones. What neither base can do, and types
that are parts of others, are left out.

"""


class NotRunnable(Exception):
    """What fails without glowq."""


def types() -> list[str]:
    """All types that transformers has, of which many are parts of other types."""
    return sorted(CONFIG_MAPPING_NAMES)


def examined(kind: str, base: str, folder: Path) -> dict[str, Any]:
    """Correct a tiny random model of a type, and check everything.

    Args:
        kind: model type.
        base: a value of `--base`.
        folder: an empty folder.

    Returns:
        "class", "groups", "shared" (number of modules that share a right factor with another), "share" (share of the
        values of all matrices, without embeddings, that are corrected).

    Raises:
        NotRunnable: the base alone fails: it cannot load the model, run it, or load what it saved.
        Exception: anything else is a fault of glowq.
    """
    if kind in _ENDLESS:
        raise NotRunnable("with random weights its answer has no bound")
    auto = auto_class(kind)
    with _of_others():
        with torch.device("meta"):
            size = sum(part.numel() for part in auto.from_config(shrunk_config(kind)).parameters())
        if size > _LARGEST:
            raise NotRunnable(f"{size:,} parameters are left of its default config with small sizes")
        save_shrunk(kind, folder / "source")
        model = _quantized(auto, folder / "source", base)
        inputs = inputs_of(model)
        if not quantized_modules(model):
            raise NotRunnable("the base quantizes none of its modules")
        plain = _watched_answers(model, inputs)
        _finite(plain)
        model.save_pretrained(folder / "plain")
        again, found = auto.from_pretrained(folder / "plain", output_loading_info=True)
        _same(_answers(again.eval(), inputs), plain)
        packed = tuple(f"{name}." for name in quantized_modules(model))
        wrong = found["missing_keys"] | {key for key in found["unexpected_keys"] if key.startswith(packed)}
        if wrong:
            raise NotRunnable(f"what it saved is not read again: {min(wrong)}")
        can_generate = _generates(model, inputs)
        model = _quantized(auto, folder / "source", base)  # bitsandbytes rounds biases in a model's first forward
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "source")
    options = {"rank": 2, "force": True, "calibration_tokens": 1024, "sequence_length": 32, "tokenizer": tokenizer}
    correction = glowq.correct(model, reference=folder / "source", calibration=_calibration(model), **options)
    model.eval()
    dense = auto.from_pretrained(folder / "source").eval()
    with Reference(folder / "source", type(model), fresh=model) as reference:
        reference.check_runs(inputs)
        _same(_answers(reference.model, inputs), _answers(dense, inputs))
    _check_products(model, inputs)
    found = _answers(model, inputs)
    if can_generate:
        _generate(model, inputs)
    model.save_pretrained(folder / "full")
    full = auto.from_pretrained(folder / "full").eval()
    _same(_answers(full, inputs), found)
    assert len(attached(full)) == len(attached(model)), f"{len(attached(full))} groups are loaded"
    correction.save_pretrained(folder / "correction")
    small = _quantized(auto, folder / "source", base)
    glowq.load_correction(small, folder / "correction")
    _same(_answers(small, inputs), found)
    groups = [entry.group for entry in attached_factors(model)]
    corrected = sum(group.in_features * sum(group.out_features) for group in groups)
    words = {id(part) for module in dense.modules() if isinstance(module, nn.Embedding) for part in module.parameters()}
    matrices = sum(part.numel() for part in dense.parameters() if part.dim() >= 2 and id(part) not in words)
    return {
        "class": type(model).__name__,
        "groups": len(groups),
        "shared": sum(len(group.members) for group in groups if len(group.members) > 1),
        "share": corrected / matrices,
    }


@contextlib.contextmanager
def _of_others() -> Iterator[None]:
    """What fails inside fails without glowq."""
    try:
        yield
    except NotRunnable:
        raise
    except Exception as error:
        raise NotRunnable(f"{type(error).__name__}: {' '.join(str(error).split())[:100]}") from error


def _quantized(auto: Any, folder: Path, base: str) -> Any:
    return auto.from_pretrained(folder, quantization_config=glowq.GlowQConfig(base=base).base).eval()


def _calibration(model: Any) -> Any:
    """Text, or random samples of what the model reads, with what its decoder reads."""
    if model.main_input_name == "input_ids":
        return TEXTS
    generator, (name, example) = torch.Generator().manual_seed(2), next(iter(inputs_of(model).items()))
    samples = [{name: torch.randn(1, *example.shape[1:], generator=generator)} for _ in range(_SAMPLES)]
    if model.config.is_encoder_decoder:
        for sample in samples:
            sample["decoder_input_ids"] = torch.randint(2, 4000, (1, 8), generator=generator)
    return samples


@torch.no_grad()
def _answers(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    output: Any = model(**inputs)
    values = output.to_tuple() if hasattr(output, "to_tuple") else output
    found = [value.float() for value in values if isinstance(value, Tensor) and value.is_floating_point()]
    if not found:
        raise NotRunnable(f"its output, {type(output).__name__}, holds no tensor")
    return found


def _watched_answers(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The answers of a base alone, whose quantized modules must be called, and with floats.

    Some models turn hidden states into the dtype of the next weight, which is that of bytes where it is packed.
    """
    called: list[torch.dtype] = []
    with contextlib.ExitStack() as stack:
        for name in quantized_modules(model):
            hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: called.append(args[0].dtype))
            stack.callback(hook.remove)
        found = _answers(model, inputs)
    if not called:
        raise NotRunnable("the inputs reach none of the modules that the base quantizes")
    for dtype in called:
        if not dtype.is_floating_point:
            raise NotRunnable(f"a quantized module gets {dtype}")
    return found


def _finite(values: list[Tensor]) -> None:
    if not all(bool(torch.isfinite(value).all()) for value in values):
        raise NotRunnable("its answers hold NaN or Inf")


def _same(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * max(1.0, float(theirs.abs().max())))


def _generates(model: Any, inputs: dict[str, Tensor]) -> bool:
    """Whether a base generates; models that cannot are not asked to."""
    if not hasattr(model, "generate") or not type(model).can_generate():
        return False
    try:
        _generate(model, inputs)
    except Exception:  # whatever it raises, a corrected model is not asked to do what the base cannot
        return False
    return True


@torch.no_grad()
def _generate(model: Any, inputs: dict[str, Tensor]) -> None:
    given = {name: value for name, value in inputs.items() if not name.startswith("decoder")}
    model.generate(**given, max_new_tokens=3, do_sample=False)


@torch.no_grad()
def _check_products(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Compare each corrected output with the base's own and dense float64 algebra; B x is computed once a forward."""
    factors = {name: (entry, left) for entry in attached_factors(model) for name, left in entry.lefts.items()}
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in factors}
    calls = dict.fromkeys(attached(model), 0)
    hooks = []
    for name in factors:

        def keep(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            seen[name].append((args[0].clone(), output.clone()))

        hooks.append(model.get_submodule(name).register_forward_hook(keep))
    for name, container in attached(model).items():

        def count(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
            calls[name] += 1

        hooks.append(container.right.register_forward_hook(count))
    model(**inputs)
    for hook in hooks:
        hook.remove()
    for name, (entry, left) in factors.items():
        assert calls[entry.group.name] <= len(seen[name]), f"{name}: B x is computed {calls[entry.group.name]} times"
        for x, found in seen[name]:
            with glowq.disabled(model):
                base = model.get_submodule(name)(x)
            added = x.double() @ entry.right.double().T @ left.double().T
            expected = base.double() + added
            size = float(expected.abs().max().clamp_min(1e-6))
            error = float((found.double() - expected).abs().max()) / size if found.numel() else 0.0
            assert error < 1e-4, f"{name}: its output differs from Q x + A B x by {error:.1e}"


def main() -> None:
    """Examine all types, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, metavar=("TYPE", "BASE"), help="examine one, and print JSON")
    parser.add_argument("--types", nargs="+", help="default: all")
    parser.add_argument("--results", type=Path, help="keep results in this file, and go on with those of this code")
    parser.add_argument("--guide", type=Path, help="write the table into this file, too")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(_one(*arguments.one)))
        return
    results: dict[str, Any] = {}
    sources = _sources()
    if arguments.results and arguments.results.is_file():
        stored = json.loads(arguments.results.read_text())
        results = stored["results"] if stored.get("sources") == sources else {}
    for kind in arguments.types or types():
        for base in BASES:
            if f"{kind} {base}" not in results:
                results[f"{kind} {base}"] = _one(kind, base)
                print(kind, base, results[f"{kind} {base}"], file=sys.stderr)
                if arguments.results:
                    arguments.results.write_text(json.dumps({"sources": sources, "results": results}, indent=1))
    if arguments.guide:
        whole = not arguments.types and not any("fault" in found for found in results.values())
        if not whole:
            raise SystemExit("the guide is written when all types were examined, and none of them has a fault")
        arguments.guide.write_text(_guide(results))
    print(_table(results))


def _sources() -> str:
    """A digest of the code that results depend on: those of other code are not used."""
    files = [*sorted(Path(glowq.__file__).parent.rglob("*.py")), Path(__file__), Path(shrunk.__file__)]
    versions = [transformers.__version__, torch.__version__]
    return sha256(b"".join(map(Path.read_bytes, files)) + repr(versions).encode()).hexdigest()


def _guide(results: dict[str, Any]) -> str:
    whole = {
        base: [name for name, found in results.items() if "class" in found and name.endswith(base)] for base in BASES
    }
    counts = " and ".join(f"{len(names)} on {base}" for base, names in whole.items())
    text = f"Every type that the base alone can do works whole: {counts}."
    return _GUIDE.format(version=transformers.__version__, counts=text) + _table(results) + "\n"


def _one(kind: str, base: str) -> dict[str, Any]:
    def late(*_: Any) -> None:
        raise TimeoutError(f"not done after {_SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(_SECONDS)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return examined(kind, base, Path(folder))
    except NotRunnable as error:
        return {"base": str(error)}
    except Exception as error:
        return {"fault": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    finally:
        signal.alarm(0)


def _table(results: dict[str, Any]) -> str:
    lines = [f"| type | class | {' | '.join(BASES)} |", "|---|---|" + "---|" * len(BASES)]
    for kind in sorted({name.split()[0] for name in results}):
        found = [results.get(f"{kind} {base}", {}) for base in BASES]
        names = [one["class"] for one in found if "class" in one]
        if names:
            lines.append(f"| `{kind}` | {names[0]} | {' | '.join(map(cell, found))} |")
    return "\n".join(lines)


def cell(found: dict[str, Any]) -> str:
    """What the table says of a type and base."""
    if "class" in found:
        return f"{found['groups']} groups, {found['share']:.0%}"
    return "not by the base" if "base" in found else "no"


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("glowq").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    main()
