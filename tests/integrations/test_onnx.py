"""The ONNX export: outputs of ONNX Runtime and onnxruntime-genai, compared with dense models of transformers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
)
from typer.testing import CliRunner

import glowq
from glowq.cli.app import app
from glowq.errors import ExportError
from glowq.integrations.export.registry import export
from glowq.integrations.onnx.check import check
from glowq.integrations.onnx.graph import describe, export_graph
from glowq.integrations.onnx.operators import use_operators
from glowq.models.loading import load_config, load_model
from support.tiny import biased_llama, correct, corrected, load, tiny_llama

# Every test needs an export, which is slow.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("half_products")]

TOLERANCE = 1e-4
TOKENS = 16


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    """Use one thread, so that sums are always computed in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A correction of an nf4 model with double quantization."""
    folder = tmp_path_factory.mktemp("onnx")
    correction = corrected(tiny_llama(folder / "llama", dtype=torch.float32), "nf4-double")[1]
    correction.save_pretrained(folder / "correction")
    return folder / "correction"


@pytest.fixture(scope="module")
def written(source: Path) -> Path:
    """The folder of the exported correction, written by the command."""
    target = source.parent / "export"
    done = CliRunner().invoke(app, ["export", str(source), "--to", "onnx", "--output", str(target), "--json"])
    assert done.exit_code == 0, done.stderr
    (source.parent / "report.json").write_text(done.stdout)
    return target


@pytest.fixture(scope="module")
def report(written: Path) -> dict[str, Any]:
    return json.loads((written.parent / "report.json").read_text())


@pytest.fixture(scope="module")
def dense(source: Path) -> Any:
    """The reference for the outputs: transformers' Llama with W' = Q + A B in float32."""
    return load(source).dequantize(torch.float32)


def session(folder: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])


def step(running: Any, ids: Tensor, mask: Tensor, past: dict[str, np.ndarray]) -> tuple[Tensor, dict[str, np.ndarray]]:
    """Run the graph on the last tokens that the mask covers. Return their logits and the new cache."""
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    feeds = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "position_ids": positions.numpy(), **past}
    names = [output.name for output in running.get_outputs()]
    found = dict(zip(names, running.run(None, feeds), strict=True))
    logits = torch.from_numpy(found.pop("logits"))
    return logits, {name.replace("present", "past_key_values"): value for name, value in found.items()}


def empty(running: Any, sequences: int) -> dict[str, np.ndarray]:
    past = [put for put in running.get_inputs() if put.name.startswith("past_key_values")]
    return {put.name: np.zeros((sequences, put.shape[1], 0, put.shape[3]), np.float32) for put in past}


@pytest.mark.parametrize(("sequences", "cached", "tokens"), [(1, 0, 1), (1, 0, 33), (3, 9, 1), (2, 11, 7)])
def test_logits_are_the_dense_models(written: Path, dense: Any, sequences: int, cached: int, tokens: int) -> None:
    running = session(written)
    ids = torch.randint(0, 4096, (sequences, cached + tokens))
    mask = torch.ones_like(ids)
    mask[0, : cached // 2] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        expected = dense(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    past = empty(running, sequences)
    parts = []
    for start, end in ((0, cached), (cached, cached + tokens)):
        if end > start:
            logits, past = step(running, ids[:, start:end], mask[:, :end], past)
            parts.append(logits)
    gap = (torch.cat(parts, 1) - expected)[mask.bool()].abs().max()
    assert float(gap) < TOLERANCE


def test_onnx_runtime_decodes_the_dense_models_tokens(written: Path, dense: Any) -> None:
    running, ids = session(written), torch.randint(0, 4096, (1, 9))
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
    expected = dense.generate(ids, attention_mask=torch.ones_like(ids), **options)
    past, new = empty(running, 1), ids
    while ids.shape[1] < expected.shape[1]:
        logits, past = step(running, new, torch.ones_like(ids), past)
        logits[..., 0] = -torch.inf  # min_new_tokens forbids the end-of-text token
        new = logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, new], 1)
    assert torch.equal(ids, expected)


def test_genai_decodes_the_dense_models_tokens(written: Path, dense: Any) -> None:
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(written))
    ids = onnxruntime_genai.Tokenizer(model).encode("def area(width, height):")
    assert ids.tolist() == AutoTokenizer.from_pretrained(written)("def area(width, height):").input_ids
    length = len(ids) + TOKENS
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, min_length=length, max_length=length)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    prompt = torch.from_numpy(ids.astype(np.int64))[None]
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
    expected = dense.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert generator.get_sequence(0).tolist() == expected[0].tolist()


def products(graph: Any) -> Counter[str]:
    """Return factor name -> number of matrix products with it in the graph."""
    found: Counter[str] = Counter()
    for node in graph.node:
        factors = [name for name in node.input if ".factor" in name]
        assert not factors or node.op_type == "MatMul"
        found.update(name.removesuffix(".transposed") for name in factors)
    return found


def test_the_right_factor_is_one_node_a_group(written: Path, source: Path, report: dict[str, Any]) -> None:
    graph = onnx.load(written / "model.onnx", load_external_data=False).graph
    groups = json.loads((source / "config.json").read_text())["quantization_config"]["groups"]
    found = products(graph)
    rights = [name for name in found if name.endswith("right.factor")]
    assert len(rights) == len(groups) == 8
    assert len(found) - len(rights) == sum(len(group["members"]) for group in groups.values()) == 14
    assert set(found.values()) == {1}
    assert Counter(node.op_type for node in graph.node if node.domain) == {"MatMulBnb4": 14} == report["operators"]
    assert report["check"]["groups"] == report["check"]["right_factor_nodes"] == 8


def test_inputs_and_outputs_have_their_usual_names_and_free_axes(written: Path) -> None:
    running = session(written)
    past = [f"past_key_values.{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value")]
    inputs = {put.name: put.shape for put in running.get_inputs()}
    assert list(inputs) == ["input_ids", "attention_mask", "position_ids", *past]
    assert [put.name for put in running.get_outputs()] == [
        "logits",
        *(name.replace("past_key_values", "present") for name in past),
    ]
    assert inputs["input_ids"] == ["batch_size", "sequence_length"]
    assert inputs["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert inputs[past[0]] == ["batch_size", 2, "past_sequence_length", 32]


def test_the_folder_needs_nothing_else(written: Path, report: dict[str, Any]) -> None:
    names = {"model.onnx", "model.onnx.data", "config.json", "genai_config.json", "tokenizer.json"}
    assert names <= set(report["files"])
    assert "quantization_config" not in json.loads((written / "config.json").read_text())
    graph = (written / "model.onnx").read_bytes()
    for path in (Path(glowq.__file__).parent, Path(torch.__file__).parents[2], written.parent):
        assert str(path).encode() not in graph
    assert report["check"]["max_difference"] < TOLERANCE
    assert report["check"]["greedy_tokens"] > 0
    assert 0 < report["kernel_difference"] < 0.02  # bitsandbytes computes in bfloat16 here


def test_the_same_correction_gives_the_same_bytes(written: Path, source: Path, tmp_path: Path) -> None:
    export(str(source), "onnx", tmp_path / "again")
    names = sorted(path.name for path in written.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (written / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_a_self_contained_model_with_biases(tmp_path: Path) -> None:
    model, _ = corrected(biased_llama(tmp_path / "llama", num_hidden_layers=1), "torchao-int4")
    model.save_pretrained(tmp_path / "full")
    AutoTokenizer.from_pretrained(tmp_path / "llama").save_pretrained(tmp_path / "full")
    facts = export(str(tmp_path / "full"), "onnx", tmp_path / "export")
    assert facts["operators"] == {"MatMulNBits": 7}
    ids = torch.randint(0, 4096, (2, 12))
    running, oracle = session(tmp_path / "export"), load(tmp_path / "full").dequantize(torch.float32)
    with torch.no_grad():
        expected = oracle(ids).logits
    found, _ = step(running, ids, torch.ones_like(ids), empty(running, 2))
    assert float((found - expected).abs().max()) < TOLERANCE


def test_an_encoder(tmp_path: Path, bundled: Path) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96}
    BertModel(BertConfig(vocab_size=4096, max_position_embeddings=512, **sizes)).save_pretrained(tmp_path / "bert")
    names = ["input_ids", "token_type_ids", "attention_mask"]
    AutoTokenizer.from_pretrained(bundled, model_input_names=names).save_pretrained(tmp_path / "bert")
    base = glowq.GlowQConfig(base="torchao-int8").base
    model = AutoModel.from_pretrained(tmp_path / "bert", quantization_config=base)
    correct(model, tmp_path / "bert").save_pretrained(tmp_path / "correction")
    facts = export(str(tmp_path / "correction"), "onnx", tmp_path / "export")
    assert facts["inputs"] == ["input_ids", "attention_mask", "token_type_ids"]
    assert facts["outputs"] == ["last_hidden_state", "pooler_output"]
    assert facts["genai"] is False
    assert facts["check"]["right_factor_nodes"] == facts["check"]["groups"]
    oracle = AutoModel.from_pretrained(tmp_path / "correction").dequantize(torch.float32)
    ids = torch.randint(1, 4096, (3, 19))
    mask = torch.ones_like(ids)
    mask[1, 11:] = 0
    kinds = torch.randint(0, 2, ids.shape)
    with torch.no_grad():
        expected = oracle(input_ids=ids, attention_mask=mask, token_type_ids=kinds).last_hidden_state
    feeds = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "token_type_ids": kinds.numpy()}
    found = torch.from_numpy(session(tmp_path / "export").run(["last_hidden_state"], feeds)[0])
    assert float((found - expected)[mask.bool()].abs().max()) < TOLERANCE


def prepared(source: Path) -> tuple[Any, Any]:
    model = load_model(str(source), load_config(str(source)))
    use_operators(model)
    return model, describe(model, AutoTokenizer.from_pretrained(source))


def test_another_models_graph_fails_the_check_with_figures(written: Path, source: Path) -> None:
    model, interface = prepared(source)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.001)
    with pytest.raises(ExportError, match=r"differ from the model's by up to \d.*expected at most 1e-04"):
        check(written, model, interface)


def test_a_right_product_that_is_not_shared_fails_the_check(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "llama", dtype=torch.float32, num_hidden_layers=1)
    corrected(folder, "nf4-double")[1].save_pretrained(tmp_path / "correction")
    model, interface = prepared(tmp_path / "correction")

    def another_tensor(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] * 3 / 3,)

    model.model.layers[0].self_attn.v_proj.register_forward_pre_hook(another_tensor)
    target = tmp_path / "export"
    target.mkdir()
    export_graph(model, interface, target)
    with pytest.raises(ExportError, match=r"q_proj\+k_proj\+v_proj' has 2 products with its right factor"):
        check(target, model, interface)
