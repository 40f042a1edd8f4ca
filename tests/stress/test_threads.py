"""Many forwards of one corrected model: in threads, with gradients, in another process, and without growth."""

from __future__ import annotations

import gc
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import glowq
from support.fresh_process import run_python
from support.tiny import CHEAP, corrected, tiny_llama

THREADS = 8
LENGTHS = (1, 3, 17, 40)
BASES = ["nf4", "torchao-int4"]


@pytest.fixture(scope="module", params=[("nf4", "auto"), ("torchao-int4", "int8")], ids=["nf4", "torchao-int4, int8"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    base, factor_dtype = request.param
    folder = tiny_llama(tmp_path_factory.mktemp("threads") / "full", dtype=torch.float32)
    found, correction = corrected(folder, base, factor_dtype=factor_dtype, **CHEAP)
    correction.save_pretrained(folder.parent / "correction")
    found.correction_folder = folder.parent / "correction"
    return found


def inputs(number: int) -> Tensor:
    length = LENGTHS[number % len(LENGTHS)]
    return torch.randint(0, 4096, (1 + number % 2, length), generator=torch.Generator().manual_seed(number))


def plain(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


def in_inference_mode(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=ids).logits.clone()
    return found


def with_cache(model: Any, ids: Tensor) -> Tensor:
    """The logits of the last token, from the cache of those before it."""
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        found: Tensor = model(input_ids=ids[:, -1:], past_key_values=cache).logits
    return found


def gradient(model: Any, ids: Tensor) -> Tensor:
    """The gradient of a loss with respect to the embedded tokens."""
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    loss = model(inputs_embeds=embedded).logits.square().mean()
    (found,) = torch.autograd.grad(loss, embedded)
    return found


KINDS: tuple[Callable[[Any, Tensor], Tensor], ...] = (plain, in_inference_mode, with_cache, gradient)
NUMBERS = len(LENGTHS) * len(KINDS)


def call(model: Any, number: int) -> Tensor:
    return KINDS[number // len(LENGTHS) % len(KINDS)](model, inputs(number))


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors differ by rounding only: each thread adds up gradients in an order of its own."""
    return torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("forwards", [24, pytest.param(1000, marks=pytest.mark.long)])
def test_threads_compute_what_one_thread_computes(model: Any, forwards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in model.modules():
        if hasattr(module, "compute_dtype"):  # of bitsandbytes: sums of bfloat16 in another order differ by more
            monkeypatch.setattr(module, "compute_dtype", torch.float32)
    expected = [call(model, number) for number in range(NUMBERS)]

    def work(thread: int) -> int:
        numbers = [(7 * thread + step) % NUMBERS for step in range(forwards)]
        return sum(not close(call(model, number), expected[number]) for number in numbers)

    with ThreadPoolExecutor(THREADS) as pool:
        wrong = list(pool.map(work, range(THREADS)))
    assert wrong == [0] * THREADS


PROGRAM = """
import pickle, sys
import torch
from transformers import AutoModelForCausalLM
import glowq

pickled, folder, ids, target = sys.argv[1:]
models = [AutoModelForCausalLM.from_pretrained(folder)]
if pickled:
    models.append(pickle.load(open(pickled, "rb")))
with torch.no_grad():
    torch.save([model(input_ids=torch.load(ids)).logits for model in models], target)
"""


def test_another_process_gets_and_loads_the_model(model: Any, tmp_path: Path) -> None:
    torch.save(inputs(3), tmp_path / "ids")
    pickled: Path | str = ""
    if model.hf_quantizer.quantization_config.quant_method == "bitsandbytes":  # plain torchao models cannot be pickled
        pickled = tmp_path / "model"
        pickled.write_bytes(pickle.dumps(model))
    run_python("-c", PROGRAM, pickled, model.correction_folder, tmp_path / "ids", tmp_path / "logits", check=True)
    for found in torch.load(tmp_path / "logits"):
        assert close(found, plain(model, inputs(3)))


def resident() -> int:
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say what a process takes")
@pytest.mark.parametrize("forwards", [300, pytest.param(10_000, marks=pytest.mark.long)])
def test_forwards_leave_nothing_behind(model: Any, forwards: int) -> None:
    for number in range(200):
        call(model, number % NUMBERS)
    gc.collect()
    objects, memory = len(gc.get_objects()), resident()
    for number in range(forwards):
        call(model, number % NUMBERS)
        if number % 50 == 0:
            with glowq.disabled(model):
                call(model, number % NUMBERS)
    gc.collect()
    assert len(gc.get_objects()) - objects < 50
    assert resident() - memory < 2**22
