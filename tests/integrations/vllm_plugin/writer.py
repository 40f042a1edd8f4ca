"""Write corrected models in both saved forms, and their outputs in transformers, for the tests in this folder.

vLLM needs a separate environment, without the quantization libraries. So this script runs in the environment of the
other tests:

    python writer.py TARGET

It writes TARGET/NAME/base, /correction and /full for each of `BASES`, with TARGET/NAME/expected.json. The factors are
random and large enough to change the outputs of the model. Their ranks differ and one group is missing. In the second
block q and v are separate groups and k is in no group, as after cutting a correction of single modules.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, CohereConfig, LlamaConfig, MixtralConfig, Phi3Config

import glowq
from glowq.artifact.build import correction_of, stored_config
from glowq.factors.factors import GroupFactors
from glowq.factors.group import Group
from glowq.factors.rounding import round_group
from glowq.integrations.transformers.merge import merge_into_dense
from glowq.models.tracing import find_groups
from glowq.quantizers.loading.dense import adopt_dense
from glowq.quantizers.model import packed_bytes, prepare_model
from glowq.quantizers.registry import base_config
from support import writers
from support.bases import small_model
from support.tiny import SHAPE, load, seeded

PROMPT, ANSWER = 24, 12  # tokens
STRENGTH = 0.3  # standard deviation of A B x for inputs with standard deviation 1


def torchao(source: Path, target: Path) -> None:
    """Save a model that torchao quantizes to integers in groups of 64, with transformers."""
    load(source, quantization_config=base_config("torchao-int4"), dtype=torch.bfloat16).save_pretrained(target)


def llama(source: Path, target: Path) -> None:
    """Save an unquantized Llama with biases and one head of keys and values, which two processes must share."""
    plain(LlamaConfig(**SHAPE | {"num_key_value_heads": 1}, attention_bias=True, mlp_bias=True), target)


def plain(config: Any, target: Path) -> None:
    """Save a random model without quantization. Its large weights make clearer predictions than default weights."""
    with seeded(0):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                nn.init.normal_(parameter, std=0.3)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(target)


BASES: dict[str, Callable[[Path, Path], None]] = {
    "gptq": partial(writers.gptqmodel, bits=4, group_size=64, desc_act=False),
    "awq": partial(writers.awq, sym=False),  # with zero points, like most AWQ models
    "awq-symmetric": writers.awq,
    "w4a16": partial(writers.compressed_tensors, num_bits=4, strategy="group", group_size=64),
    "w4a16-int8": partial(writers.compressed_tensors, num_bits=4, strategy="group", group_size=64),
    "w4a16-int4": partial(writers.compressed_tensors, num_bits=4, strategy="group", group_size=64),
    "w4a16-asym": partial(writers.compressed_tensors, num_bits=4, strategy="group", group_size=64, symmetric=False),
    "w8a8": partial(
        writers.compressed_tensors,
        num_bits=8,
        strategy="channel",
        input_activations={"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True},
    ),
    "w8a16": partial(writers.compressed_tensors, num_bits=8, strategy="channel"),
    "gptq-8": partial(writers.gptqmodel, bits=8, group_size=64, desc_act=False),
    "torchao": torchao,
    "llama": llama,
    "cohere": lambda source, target: plain(CohereConfig(**SHAPE), target),  # q, k, v, gate and up share an input
    "phi3": lambda source, target: plain(Phi3Config(**SHAPE), target),  # its own layers fuse q, k, v and gate, up
    "mixtral": lambda source, target: plain(MixtralConfig(**SHAPE, num_local_experts=4), target),
}


FACTOR_BITS = {"w4a16-int8": 8, "w4a16-int4": 4}  # bases whose factors are stored in few bits


def random_factors(model: Any, groups: list[Group]) -> list[GroupFactors]:
    """Return random factors of ranks 3, 4, 5, ..., scaled by `STRENGTH`."""
    found = []
    for index, group in enumerate(groups):
        generator = torch.Generator().manual_seed(index)
        rank = 3 + index
        scale = STRENGTH / (group.in_features * rank) ** 0.5

        def draw(*shape: int, by: float, generator: torch.Generator = generator) -> Tensor:
            return (torch.randn(*shape, generator=generator) * by).to(model.dtype)

        lefts = {member: draw(width, rank, by=1.0) for member, (width, _) in group.shapes.items()}
        gains = torch.ones(rank, dtype=torch.float64)
        found.append(GroupFactors(group, draw(rank, group.in_features, by=scale), lefts, gains, float(rank)))
    return found


def some_groups(model: Any, ids: Tensor) -> list[Group]:
    """Return the groups of the model. In the second block o and k are left out, and q and v are separate groups."""
    groups = []
    for group in find_groups(model, {"input_ids": ids}):
        if ".1.self_attn.o_proj" in group.name:
            continue
        if ".1.self_attn.q_proj+" in group.name:
            for index in (0, 2):
                member, width = group.members[index], group.out_features[index]
                groups.append(Group(member, (member,), group.in_features, (width,), group.block))
        else:
            groups.append(group)
    return groups


def scores(model: Any, ids: Tensor) -> Tensor:
    """Return the log-probabilities of all next tokens, shape (n, length - 1, vocabulary), float32."""
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
    return found


def exact(folder: Path, *, corrected: bool = True) -> Any:
    """Return the model as a dense model in float32, without its correction if not `corrected`."""
    model = load(folder, dtype=torch.bfloat16)
    if not corrected:
        glowq.detach(model)
    merge_into_dense(model, torch.float32)
    return nn.Module.float(model)  # transformers still marks the model as quantized, so its float() raises


def expected(folder: Path, prompts: Tensor) -> dict[str, Any]:
    """Return greedy answers of transformers and the log-probabilities of their tokens.

    From the prompts that the base answers differently, this selects the three with the clearest predictions.
    """
    model, dense = load(folder, dtype=torch.bfloat16), exact(folder)
    options: dict[str, Any] = {"max_new_tokens": ANSWER, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = model.generate(prompts, **options)
    with glowq.disabled(model):
        ids = ids[(ids != model.generate(prompts, **options)).any(1)]
    best = scores(dense, ids)[:, PROMPT - 1 :].topk(2).values
    ids = ids[(best[..., 0] - best[..., 1]).amin(1).argsort(descending=True)[:3]]
    record: dict[str, Any] = {"prompts": ids[:, :PROMPT].tolist(), "answers": ids[:, PROMPT:].tolist()}

    def token_scores(model: Any) -> list[list[float]]:
        found: list[list[float]] = scores(model, ids).gather(2, ids[:, 1:, None])[..., 0].tolist()
        return found

    record["corrected"] = {"bfloat16": token_scores(model), "float32": token_scores(dense)}
    with glowq.disabled(model):
        record["base"] = {"bfloat16": token_scores(model), "float32": token_scores(exact(folder, corrected=False))}
    return record


def write(name: str, target: Path) -> None:
    """Write one model of `BASES`, its correction in both forms, and the expected outputs."""
    base = target / "base"
    BASES[name](small_model(), base)
    tokenizer = AutoTokenizer.from_pretrained(small_model())
    tokenizer.save_pretrained(base)
    ids = tokenizer("\n".join(writers.TEXTS[:8]), return_tensors="pt").input_ids[0]
    prompts = ids[: len(ids) // PROMPT * PROMPT].reshape(-1, PROMPT)
    model = load(base, dtype="auto")
    if not hasattr(model.config, "quantization_config"):
        adopt_dense(model)
    prepare_model(model)
    size = packed_bytes(model)
    factors = random_factors(model, some_groups(model, prompts[:1]))
    if name in FACTOR_BITS:
        factors = [round_group(entry, FACTOR_BITS[name]) for entry in factors]
    config = stored_config(model, base, size, "glowq", prompts, 0)
    correction_of(model, factors, config, size, tokenizer).save_pretrained(target / "correction")
    glowq.load_correction(model, target / "correction")
    model.save_pretrained(target / "full")
    tokenizer.save_pretrained(target / "full")
    (target / "expected.json").write_text(json.dumps(expected(target / "full", prompts)))


if __name__ == "__main__":
    for each in BASES:
        write(each, Path(sys.argv[1]).resolve() / each)
