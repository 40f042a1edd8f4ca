"""Make a small mixture of experts with trained weights: python examples/mixture.py build/models/stdlib-mixtral

Every expert starts as a random half of the feed-forward channels of the bundled model (`examples/stdlib-llama`), so
that two of them, each with half of the weight, compute about what the whole layer computed. Then the whole model is
trained on the files that the bundled model was trained on, with Mixtral's own loss for a balanced router.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from glowq.data.text import read_texts
from glowq.data.tokens import token_sequences

SOURCE = Path(__file__).parent / "stdlib-llama"
EXPERTS, ACTIVE, LENGTH, BATCH = 8, 2, 256, 8
PEAK, WARMUP = 2e-4, 0.05  # learning rate; share of the steps


def main() -> None:
    """Train and save the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=400, help=f"of {BATCH * LENGTH} tokens each")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(SOURCE)
    model = upcycled()
    tokens = arguments.steps * BATCH * LENGTH
    texts = read_texts("python-stdlib")
    sequences = token_sequences(texts, tokenizer, length=LENGTH, limit=tokens, seed=arguments.seed)
    train(model, sequences[torch.randperm(len(sequences))])
    model.bfloat16().save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)


def upcycled() -> MixtralForCausalLM:
    """A mixture whose experts are halves of the bundled model's feed-forward layers."""
    dense = AutoModelForCausalLM.from_pretrained(SOURCE, dtype=torch.float32)
    shared = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    special = ("max_position_embeddings", "rms_norm_eps", "rope_parameters")
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    settings = {name: getattr(dense.config, name) for name in (*shared, *special, *tokens)}
    half = dense.config.intermediate_size // ACTIVE
    config = MixtralConfig(
        **settings,
        intermediate_size=half,
        num_local_experts=EXPERTS,
        num_experts_per_tok=ACTIVE,
        tie_word_embeddings=True,
        sliding_window=None,
        output_router_logits=True,
        router_aux_loss_coef=0.02,
    )
    model = MixtralForCausalLM(config)
    found = model.load_state_dict(dense.state_dict(), strict=False)
    assert all(".mlp." in name for name in (*found.missing_keys, *found.unexpected_keys)), found
    with torch.no_grad():
        for old, new in zip(dense.model.layers, model.model.layers, strict=True):
            for expert in range(EXPERTS):
                rows = torch.randperm(dense.config.intermediate_size)[:half]
                gate, up = old.mlp.gate_proj.weight[rows], old.mlp.up_proj.weight[rows]
                new.mlp.experts.gate_up_proj[expert] = torch.cat([gate, up])
                new.mlp.experts.down_proj[expert] = ACTIVE * old.mlp.down_proj.weight[:, rows]
    return model


def train(model: MixtralForCausalLM, sequences: Tensor) -> None:
    """AdamW with a cosine schedule, one pass over the sequences."""
    steps = len(sequences) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK, total_steps=steps, pct_start=WARMUP, anneal_strategy="cos"
    )
    model.train()
    start, losses = time.perf_counter(), []
    for step in range(steps):
        batch = sequences[step * BATCH : (step + 1) * BATCH]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 20 == 0 or step == steps - 1:
            recent = sum(losses[-20:]) / len(losses[-20:])
            print(f"step {step + 1} of {steps}, loss {recent:.3f}, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
