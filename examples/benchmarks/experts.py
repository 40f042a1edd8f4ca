"""Measure whether ranks pay for the experts of a mixture, and whether a right factor should serve all of a layer.

python examples/mixture.py build/models/stdlib-mixtral
python examples/benchmarks/experts.py build/models/stdlib-mixtral

torchao rounds the matrices of attention and experts to `--bits`, in groups of 64. Each budget is spent three times: on
any group, on attention alone and on experts alone. The text is the Python standard library; calibration, selection and
evaluation use different parts.

Sharing is compared on the matrices that read the hidden states (`gate_up_proj`), at equal bytes, by the squared output
error that is removed, with the moments of each expert's own tokens: a right factor for each expert, or one for all
experts of a layer, from their common moment, with a left factor that is the best for each expert's own tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup
from transformers import AutoModelForCausalLM, AutoTokenizer

import glowq
from glowq.calibration.input_moments import MomentCollector, collecting
from glowq.data.inputs import batches
from glowq.data.text import read_texts
from glowq.data.tokens import token_sequences
from glowq.evaluation.scores import perplexity, score_models, undone
from glowq.factors.group import Group
from glowq.models.tracing import find_groups
from glowq.quantizers.experts import WHOLE, ExpertLinear, open_experts
from glowq.runtime.attach import applied
from glowq.selection.budget import RankRequest
from glowq.selection.ranks import choose_ranks
from glowq.solving.low_rank import factorize, weighted_error

LENGTH, BATCH, GROUP_SIZE = 256, 8, 64
KINDS = {"any group": ("",), "attention alone": (".self_attn.",), "experts alone": (".experts.",)}


def main() -> None:
    """Print what each budget undoes, and what sharing removes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--budgets", type=float, nargs="+", default=[1, 3, 6], help="percent of the quantized bytes")
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--tokens", type=int, default=16384, help="held-out tokens to evaluate on")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = [measure(arguments, bits) for bits in arguments.bits]
    if arguments.json:
        print(json.dumps({"command": sys.argv, "results": found}, indent=1))
    for result in [] if arguments.json else found:
        print(f"{result['bits']} bits: perplexity {result['perplexity']:.2f}, KL divergence {result['kl']:.4f}")
        for row in result["budgets"]:
            low, high = row["interval"]
            print(f"  {row['budget']:g}% on {row['on']}: {row['undone']:.1%} [{low:.1%}, {high:.1%}]")
        for row in result["sharing"]:
            print(
                f"  rank {row['rank']} of each: {row['own']:.1%}; shared, rank {row['shared_rank']}: {row['one']:.1%}"
            )


def measure(arguments: argparse.Namespace, bits: int) -> dict[str, Any]:
    """Correct the model, rounded to `bits`, and measure both questions."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    calibration, held_out = (
        token_sequences(read_texts(name), tokenizer, length=LENGTH, limit=limit)
        for name, limit in (
            ("python-stdlib", arguments.calibration_tokens),
            ("python-stdlib:held-out", arguments.tokens),
        )
    )
    reference = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    with TemporaryDirectory() as folder:
        rounded = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
        base_bytes = round_weights(rounded, bits)
        rounded.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        most = int(max(arguments.budgets) / 100 * base_bytes)
        # Twice the largest budget is solved, so that neither kind of groups is short of ranks when it gets all of it.
        options: dict[str, Any] = {"reference": reference, "calibration": calibration, "factor_dtype": "float"}
        correction = glowq.correct(model, budget=2 * most, dense=True, **options)
        glowq.detach(model)
        scores = score_models({"reference": reference, "quantized": model}, held_out)
        rows = []
        for percent in arguments.budgets:
            for kind, parts in KINDS.items():
                gains = [item for item in correction.group_gains if any(part in item.group.name for part in parts)]
                request = RankRequest(budget=int(percent / 100 * base_bytes))
                kept = correction.kept(choose_ranks(gains, request, base_bytes, correction.config.total))
                with applied(model, kept.factors):
                    scores |= score_models({"reference": reference, kind: model}, held_out)
                share = undone(scores["quantized"], scores[kind])
                spent = sum(entry.factor_bytes for entry in kept.factors if ".experts." in entry.group.name)
                rows.append(
                    {
                        "budget": percent,
                        "on": kind,
                        "undone": share.value,
                        "interval": [share.low, share.high],
                        "bytes": kept.factor_bytes,
                        "bytes_of_experts": spent,
                    }
                )
        sharing = share_right_factors(model, reference, calibration, (1, 2, 4, 8))
    quantized = scores["quantized"]
    return {
        "bits": bits,
        "base_bytes": base_bytes,
        "full_precision": perplexity(scores["reference"]),
        "perplexity": perplexity(quantized),
        "kl": float(quantized.kl.mean()),
        "budgets": rows,
        "sharing": sharing,
    }


@torch.no_grad()
def round_weights(model: nn.Module, bits: int) -> int:
    """Round the matrices of attention and experts in place; returns their bytes with 16-bit scales."""
    open_experts(model, lambda stack: WHOLE)
    total = 0
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and (isinstance(layer, ExpertLinear) or ".self_attn." in name):
            single = nn.Linear(layer.in_features, layer.out_features, bias=False)
            single.weight.copy_(layer.weight)
            kind = getattr(torch, f"int{bits}")
            quantize_(single, IntxWeightOnlyConfig(weight_dtype=kind, granularity=PerGroup(GROUP_SIZE)))
            weight: Any = single.weight
            layer.weight.copy_(weight.dequantize())
            total += layer.weight.numel() * bits // 8 + 2 * layer.weight.numel() // GROUP_SIZE
    return total


@torch.no_grad()
def share_right_factors(
    model: nn.Module, reference: nn.Module, calibration: Tensor, ranks: Iterable[int]
) -> list[dict[str, Any]]:
    """Shares of the squared output error of `gate_up_proj` that both kinds of factors remove, at equal bytes."""
    groups = [group for group in find_groups(model, {"input_ids": calibration[:8]}) if "gate_up_proj" in group.name]
    collectors = {group.name: MomentCollector(group, "second") for group in groups}
    with collecting(model, list(collectors.values())):
        for batch in batches(calibration, BATCH):
            model(**batch, use_cache=False)
    layers: dict[str, list[Group]] = {}
    for group in groups:
        layers.setdefault(group.block, []).append(group)
    removed = {rank: [0.0, 0.0, 0.0] for rank in ranks}  # by own factors, by shared ones, and all error
    shared_ranks: dict[int, int] = {}
    for members in layers.values():
        errors, moments = [], []
        for group in members:
            pair = [m.get_submodule(group.members[0]) for m in (reference, model)]
            errors.append(pair[0].weight.double() - pair[1].weight.double())  # type: ignore[operator]
            found = collectors[group.name].moments()
            assert found.second is not None
            moments.append(found.second * found.tokens)
        outputs, inputs = errors[0].shape
        common = torch.stack(moments).sum(0)
        for rank in ranks:
            wide = len(members) * rank * (inputs + outputs) // (inputs + len(members) * outputs)
            shared_ranks[rank] = wide
            right = factorize(torch.cat(errors), common, wide).right.double()
            for error, moment in zip(errors, moments, strict=True):
                whole = float(((error @ moment) * error).sum())
                own = weighted_error(error, factorize(error, moment, rank), moment)
                seen = right @ moment
                left = torch.linalg.lstsq(seen @ right.T, (error @ seen.T).T).solution.T
                rest = error - left @ right
                for place, value in enumerate((whole - own, whole - float(((rest @ moment) * rest).sum()), whole)):
                    removed[rank][place] += value
    return [
        {
            "rank": rank,
            "shared_rank": shared_ranks[rank],
            "own": own / whole,
            "one": one / whole,
        }
        for rank, (own, one, whole) in removed.items()
    ]


if __name__ == "__main__":
    main()
