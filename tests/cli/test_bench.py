"""`glowq bench`: consistent figures, three models that share the memory of one base, and errors."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import glowq
from glowq.evaluation.timing import Shape, measure, variants
from glowq.factors.rounding import round_group
from glowq.quantizers.model import prepare_model
from glowq.runtime.attach import attach, attached, attached_factors, detach
from glowq.utils.manifest import MANIFEST
from support.cli import call, encoder, result_of
from support.tiny import IDS, correct, corrected, load, logits, quantized, seeded, tiny_llama

MODELS = ["base", "shared", "per module"]
SIZES = ["--batch-sizes", "1,3", "--lengths", "5, 18", "--new-tokens", 4, "--repeats", 3]
LEAST = ["--batch-sizes", 1, "--lengths", 4, "--new-tokens", 1, "--repeats", 1]
PNG = b"\x89PNG\r\n\x1a\n"


def figures(kind: str) -> set[str]:
    return {kind, f"{kind}_tokens_per_second", f"{kind}_added", f"{kind}_overhead"}


ROW = {"model", "batch", "length", "factor_bytes", "byte_ratio", "peak_bytes"} | figures("first_token")


@pytest.fixture(scope="module")
def timed(rank_8: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The result of --json and the output folder, for two batch sizes and two lengths."""
    output = tmp_path_factory.mktemp("bench") / "out"
    return result_of("bench", rank_8, *SIZES, "--seed", 7, "--output", output), output


class TestResult:
    def test_a_row_for_each_shape_and_model(self, timed: tuple[dict[str, Any], Path], rank_8: Path) -> None:
        result, output = timed
        assert [(row["batch"], row["length"], row["model"]) for row in result["rows"]] == [
            (batch, length, model) for batch in (1, 3) for length in (5, 18) for model in MODELS
        ]
        assert all(set(row) == ROW | figures("decode") for row in result["rows"])
        assert set(result) == {
            *("model", "device", "threads", "torch", "platform", "dtype", "rows", "command", "output"),
            *("new_tokens", "repeats", "compiled", "seed", "factor_dtype"),
        }
        assert (result["model"], result["output"]) == (str(rank_8), str(output))
        assert (result["new_tokens"], result["repeats"], result["compiled"], result["seed"]) == (4, 3, False, 7)
        assert (result["torch"], result["dtype"]) == (torch.__version__, "bfloat16")
        assert result["threads"] == torch.get_num_threads()
        assert result["command"].startswith("glowq bench ")
        assert result["command"].endswith(" --output DIR --json")

    @pytest.mark.parametrize("kind", ["first_token", "decode"])
    def test_times_agree_with_each_other(self, timed: tuple[dict[str, Any], Path], kind: str) -> None:
        rows = timed[0]["rows"]
        for base, *others in (rows[at : at + 3] for at in range(0, len(rows), 3)):
            assert base[f"{kind}_added"] == [0, 0, 0]
            assert base[f"{kind}_overhead"] == 0
            for row in (base, *others):
                low, median, high = row[kind]
                assert 0 < low <= median <= high
                assert row[f"{kind}_added"] == sorted(row[f"{kind}_added"])
                assert row[f"{kind}_overhead"] == pytest.approx(row[f"{kind}_added"][1] / base[kind][1])
                tokens = row["batch"] * (row["length"] if kind == "first_token" else 1)
                assert row[f"{kind}_tokens_per_second"] == pytest.approx(tokens / median)

    def test_bytes_are_the_corrections(self, timed: tuple[dict[str, Any], Path], rank_8: Path) -> None:
        inspected = result_of("inspect", rank_8)
        groups = json.loads((rank_8 / "config.json").read_text())["quantization_config"]["groups"].values()
        apart = [(g["rank"], g["in_features"], width) for g in groups for width in g["out_features"]]
        expected = {
            "base": 0,
            "shared": inspected["factor_bytes"],
            "per module": sum(rank * (inputs + outputs) * torch.bfloat16.itemsize for rank, inputs, outputs in apart),
        }
        assert 0 < expected["shared"] < expected["per module"]
        for row in timed[0]["rows"]:
            assert row["factor_bytes"] == expected[row["model"]]
            assert row["byte_ratio"] == pytest.approx(row["factor_bytes"] / inspected["base_bytes"])
            if Path("/proc/self/clear_refs").exists():
                assert row["peak_bytes"] > 50e6

    def test_a_seed_draws_the_tokens(self, rank_8: Path) -> None:
        model, seen, drawn = load(rank_8), [], []
        keep = lambda module, args, options: seen.append(options["input_ids"])  # noqa: E731
        model.register_forward_pre_hook(keep, with_kwargs=True)
        for seed in (1, 1, 2):
            measure({"base": model}, [Shape(2, 5)], 1, new_tokens=2, repeats=2, seed=seed)
            drawn.append(torch.cat(seen, -1))
            seen.clear()
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])


class TestFiles:
    def test_what_the_folder_holds(self, timed: tuple[dict[str, Any], Path]) -> None:
        result, output = timed
        assert sorted(entry.name for entry in output.iterdir()) == ["bench.json", "bench.png", MANIFEST, "table.md"]
        stored = json.loads((output / "bench.json").read_text())
        assert stored == {name: value for name, value in result.items() if name != "output"}
        assert (output / "bench.png").read_bytes().startswith(PNG)
        table = (output / "table.md").read_text()
        assert result["command"] in table
        lines = [line for line in table.splitlines() if line.startswith("| ")]
        assert len(lines) == 2 + len(result["rows"])
        assert len({line.count("|") for line in lines}) == 1
        for line, row in zip(lines[2:], result["rows"], strict=True):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert cells[:3] == [str(row["batch"]), str(row["length"]), row["model"]]
            assert cells[3].startswith(f"{1e3 * row['first_token'][1]:.2f} [")
            assert cells[6].startswith(f"{1e3 * row['decode'][1]:.2f} [")

    def test_only_an_earlier_result_is_replaced(self, timed: tuple[dict[str, Any], Path], rank_8: Path) -> None:
        output = Path(shutil.copytree(timed[1], timed[1].with_name("again")))
        done = call("bench", rank_8, *LEAST, "--output", output)
        assert done.exit_code == 0, done.stderr
        assert "per module" in done.stdout
        assert len(json.loads((output / "bench.json").read_text())["rows"]) == 3
        (output / "thesis.tex").write_text("years of work")
        before = (output / "bench.json").read_bytes()
        refused(call("bench", rank_8, *LEAST, "--output", output), "thesis.tex")
        assert (output / "bench.json").read_bytes() == before

    def test_a_correction_is_never_replaced(self, rank_8: Path, tmp_path: Path) -> None:
        other = Path(shutil.copytree(rank_8, tmp_path / "correction"))
        refused(call("bench", rank_8, *LEAST, "--output", other), "is not empty and holds")
        assert sorted(entry.name for entry in other.iterdir()) == sorted(entry.name for entry in rank_8.iterdir())


def memory(model: nn.Module) -> dict[str, int]:
    """Return the address of every tensor of the base."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.data_ptr() for name, tensor in tensors.items() if "glowq_" not in name}


class TestThreeModels:
    @pytest.fixture
    def model(self, rank_8: Path) -> Any:
        return load(rank_8).eval()

    @pytest.mark.parametrize("ids", [IDS, IDS[:1, :3]], ids=["many tokens", "a few"])
    def test_they_compute_what_their_names_say(self, model: Any, source: Path, ids: Tensor) -> None:
        plain = quantized(source, "nf4")
        prepare_model(plain)
        corrected = logits(model, ids)
        found = {name: logits(made, ids) for name, made in variants(model).items()}
        assert list(found) == MODELS
        assert torch.equal(found["base"], logits(plain, ids))
        assert torch.equal(found["shared"], corrected)
        # The same products, but each is rounded separately: a difference of at most two steps at the largest logit.
        rounding = 2 * torch.finfo(torch.bfloat16).eps * float(corrected.abs().max())
        assert float((found["per module"] - corrected).abs().max()) <= rounding
        assert float((found["base"] - corrected).abs().max()) > 4 * rounding

    def test_fast_kernels_rewrite_the_weights_of_all_three(self, model: Any) -> None:
        """The three models share the memory of the weights, which must be rewritten only once."""
        before = {name: logits(made) for name, made in variants(model).items()}
        glowq.use_fast_kernels(model)
        for turn in (MODELS, MODELS[::-1]):
            made = variants(model)
            for name in turn:
                rounding = 8 * torch.finfo(torch.bfloat16).eps * float(before[name].abs().max())
                assert float((logits(made[name]) - before[name]).abs().max()) <= rounding

    def test_in_int8_they_compute_what_rounded_factors_do(self, model: Any, source: Path) -> None:
        made = variants(model, factor_dtype="int8")
        assert list(made) == [*MODELS, "shared, int8", "per module, int8"]
        for name, each in made.items():
            assert all((part.bits == 8) is name.endswith("int8") for part in attached(each).values())
        again = quantized(source, "nf4")
        prepare_model(again)
        for entry in attached_factors(model):
            attach(again, round_group(entry, 8))
        assert torch.equal(logits(made["shared, int8"]), logits(again))

    def test_they_share_every_tensor_of_the_base(self, model: Any) -> None:
        made = variants(model)
        assert made["shared"] is model
        assert len({id(each) for each in made.values()}) == 3
        expected = memory(model)
        assert len(expected) > 2 * 7
        assert all(memory(each) == expected for each in made.values())
        assert not attached(made["base"])
        assert len(attached(made["per module"])) == 2 * 7
        assert all(len(part.group.members) == 1 for part in attached(made["per module"]).values())

    def test_the_model_stays_as_it_was(self, model: Any) -> None:
        before, keys = logits(model), list(model.state_dict())
        factors = {entry.group: entry for entry in attached_factors(model)}
        made = variants(model)
        measure(made, [Shape(1, 4)], 1, new_tokens=1, repeats=1)
        detach(made["per module"])
        assert torch.equal(logits(made["base"]), logits(made["per module"]))
        assert torch.equal(logits(model), before)
        assert list(model.state_dict()) == keys
        for entry in attached_factors(model):
            assert torch.equal(entry.right, factors[entry.group].right)
            assert all(torch.equal(left, factors[entry.group].lefts[name]) for name, left in entry.lefts.items())


def refused(done: Any, message: str) -> None:
    """Assert that a command failed with status 1 and this message on one line of stderr."""
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert re.fullmatch(r"glowq: error: [^\n]+\n", done.stderr), done.stderr
    assert message in done.stderr


class TestRefused:
    def test_a_model_without_a_correction(self, source: Path) -> None:
        refused(call("bench", source, *LEAST, "--json"), "carries no correction")

    def test_int8_of_what_is_int8_already(self, rank_8: Path, tmp_path: Path) -> None:
        glowq.Correction.from_pretrained(rank_8).rounded("int8").save_pretrained(tmp_path / "int8")
        refused(call("bench", tmp_path / "int8", *LEAST, "--factor-dtype", "int8"), "leave out --factor-dtype")

    @pytest.mark.parametrize(
        "option",
        [
            *("--batch-sizes=0", "--batch-sizes=x", "--batch-sizes=1,,2", "--batch-sizes=-1", "--batch-sizes=²"),
            *("--lengths=", "--lengths=8,", "--lengths=1.5", "--new-tokens=0", "--repeats=0", "--threads=0"),
        ],
    )
    def test_wrong_usage(self, option: str) -> None:
        assert call("bench", "nowhere", option).exit_code == 2

    def test_prompts_longer_than_the_model_takes(self, rank_8: Path, tmp_path: Path) -> None:
        long = ["--lengths", "8,509", "--new-tokens", 4, "--output", tmp_path / "never"]
        refused(call("bench", rank_8, *long), "takes sequences of 512 tokens")
        assert not (tmp_path / "never").exists()
        assert call("bench", rank_8, *LEAST[:2], "--lengths", 511, *LEAST[4:]).exit_code == 0

    def test_without_matplotlib(self, rank_8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("glowq.evaluation.plots.find_spec", lambda name: None)
        refused(call("bench", rank_8, *LEAST, "--output", tmp_path / "never"), "pip install 'glowq[plot]'")
        assert not (tmp_path / "never").exists()


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A correction of an encoder with 64 positions."""
    path = tmp_path_factory.mktemp("bert")
    shape = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
    shape["max_position_embeddings"] = 64
    with seeded(0):
        folder = encoder(path / "full", BertModel(BertConfig(vocab_size=4096, **shape)))
    model = AutoModel.from_pretrained(folder, quantization_config=glowq.GlowQConfig(base="nf4").base)
    correct(model, folder, sequence_length=32).save_pretrained(path / "corrected")
    return path / "corrected"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A correction of a decoder with a table of 64 position embeddings."""
    path = tmp_path_factory.mktemp("gpt2")
    tokens = {"vocab_size": 4096, "bos_token_id": 0, "eos_token_id": 0}
    with seeded(0):
        model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=64, n_head=2, n_positions=64, **tokens))
    encoder(path / "full", model)
    with torch.no_grad():
        for parameter in model.transformer.h.parameters():
            parameter.copy_((parameter * 64).round() / 64)
    model = load(encoder(path / "rounded", model))
    options = {"reference": path / "full", "sequence_length": 32, "dense": True}
    correct(model, path / "rounded", **options).save_pretrained(path / "corrected")
    return path / "corrected"


class TestOtherModels:
    def test_an_encoder_decodes_nothing(self, bert: Path, tmp_path: Path) -> None:
        output = tmp_path / "out"
        options = ["--batch-sizes", "1,2", "--lengths", 8, "--repeats", 2, "--output", output]
        result = result_of("bench", bert, *options)
        assert [row["model"] for row in result["rows"]] == MODELS * 2
        assert all(set(row) == ROW for row in result["rows"])
        assert (output / "bench.png").read_bytes().startswith(PNG)
        lines = (output / "table.md").read_text().splitlines()
        assert len({line.count("|") for line in lines if line.startswith("| ")}) == 1

    def test_an_encoder_reads_up_to_its_last_position(self, bert: Path) -> None:
        """An encoder decodes nothing after the prompt, so the prompt may use all positions."""
        options = ["--batch-sizes", 1, "--lengths", 64, "--repeats", 1]
        assert [row["length"] for row in result_of("bench", bert, *options)["rows"]] == [64] * 3

    def test_a_decoder_reads_up_to_its_last_position(self, gpt2: Path) -> None:
        options = ["--batch-sizes", 1, "--lengths", 63, "--new-tokens", 1, "--repeats", 1]
        assert [row["length"] for row in result_of("bench", gpt2, *options)["rows"]] == [63] * 3
        refused(call("bench", gpt2, *options, "--new-tokens", 2), "takes sequences of 64 tokens")


@pytest.fixture(scope="module")
def one_block(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A correction of a model with one block, because tracing takes seconds per block, model and shape."""
    folder = tmp_path_factory.mktemp("one-block")
    corrected(tiny_llama(folder / "llama", num_hidden_layers=1), "nf4")[1].save_pretrained(folder / "correction")
    return folder / "correction"


class TestSettings:
    @pytest.fixture
    def two_threads(self) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        yield
        torch.set_num_threads(before)

    @pytest.mark.usefixtures("two_threads")
    def test_threads(self, rank_8: Path) -> None:
        assert result_of("bench", rank_8, *LEAST, "--threads", 1)["threads"] == 1

    @pytest.mark.slow
    def test_every_model_and_shape_gets_a_graph(self, one_block: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """These are more graphs than torch.compile compiles for one function by default."""
        torch.compiler.reset()
        models = variants(load(one_block).eval())
        shapes, graphs = [Shape(1, 4), Shape(2, 6)], []

        def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            graphs.append(graph)
            return graph.forward

        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
        rows = measure(models, shapes, 1, new_tokens=1, repeats=1, compiled=True)
        assert len(graphs) > 8  # the default limit of recompilations, which other libraries may raise
        assert len(rows) == len(models) * len(shapes)
        torch.compiler.reset()

    @pytest.mark.slow
    def test_compiled(self, one_block: Path) -> None:
        torch.compiler.reset()
        result = result_of("bench", one_block, *LEAST, "--compile")
        assert result["compiled"] is True
        assert [row["model"] for row in result["rows"]] == MODELS
        torch.compiler.reset()
