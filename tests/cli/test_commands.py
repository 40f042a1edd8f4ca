"""The commands as users type them: results, exit codes and stdout."""

import json
import re
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel, T5Config, T5Model

import glowq
from glowq.cli.app import app
from glowq.data.text import read_texts
from glowq.data.tokens import token_sequences
from glowq.pipeline.block_store import Resume
from glowq.quantizers.model import prepare_model
from glowq.runtime.attach import attached
from support.bases import small_model
from support.cli import call, encoder, fresh, result_of

MODEL = str(Path(__file__).parents[2] / "examples" / "stdlib-llama")
COMMANDS = sorted(command.name for command in app.registered_commands)
SIZES = ["--rank", "8", "--calibration-tokens", "1024", "--sequence-length", "64"]
WIDTHS = ["--tokens", "512", "--sequence-length", "64"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Use one thread, so that sums are computed in the same order as in a new process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def notes(folder):
    library = Path(sysconfig.get_paths()["stdlib"])
    file = folder / "notes.txt"
    file.write_text("".join((library / name).read_text("utf-8") for name in ("csv.py", "shutil.py", "textwrap.py")))
    return file


@pytest.fixture(scope="module")
def corrected(folder, notes):
    """The finished process and the folder of its correction. It runs in a folder that holds only the text."""
    arguments = ["correct", MODEL, "--base", "nf4", "--calibration", "notes.txt", "--output", "out", *SIZES, "--json"]
    return fresh(folder, *arguments), folder / "out"


@pytest.fixture(scope="module")
def correction(corrected):
    return corrected[1]


@pytest.fixture(scope="module")
def quantized(folder):
    """Folder of the model quantized and saved by transformers alone, without its tokenizer."""
    config = glowq.GlowQConfig(base="nf4").base
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto", quantization_config=config)
    prepare_model(model)
    model.save_pretrained(folder / "nf4")
    return folder / "nf4"


class TestCorrect:
    def test_json_alone_reaches_stdout(self, corrected):
        done, folder = corrected
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert set(result) == {
            *("output", "groups", "ranks", "factor_bytes", "base_bytes", "overhead", "calibration_tokens", "seconds"),
            *(
                "peak_rss_bytes",
                "slow_here",
                "timeline",
                "held_out",
                "command",
                "seed",
                "predicted",
                "gains",
                "factor_dtype",
                "distilled_steps",
                "rounding",
                "improvement",
                "instead",
                "mixed",
                "coverage",
            ),
        }
        assert result["coverage"]["text"][0] == f"{result['coverage']['corrected']:.1%} corrected"
        assert result["output"] == "out"
        assert result["groups"] == len(result["ranks"]) == 32
        assert set(result["ranks"].values()) == {8}
        assert result["overhead"] == result["factor_bytes"] / result["base_bytes"]
        assert result["calibration_tokens"] == 1024 * 7 // 8
        assert result["peak_rss_bytes"] > 50e6
        assert shlex.split(result["command"])[:3] == ["glowq", "correct", MODEL]
        assert sorted(entry.name for entry in folder.parent.iterdir()) == ["notes.txt", "out"]

    def test_held_out_figures(self, corrected):
        held_out = json.loads(corrected[0].stdout)["held_out"]
        assert held_out["tokens"] == 1024 // 8
        gap = held_out["quantized"] - held_out["reference"]
        assert held_out["recovered"] == pytest.approx((held_out["quantized"] - held_out["corrected"]) / gap)
        assert held_out["recovered_ci95"] is None  # two sequences are too few for a bootstrap

    def test_an_interval_from_eight_held_out_sequences_on(self, notes, folder):
        sizes = ["--rank", "2", "--calibration-tokens", "2048", "--sequence-length", "32"]
        options = ["--base", "nf4", "--calibration", notes, "--output", folder / "interval", *sizes]
        held_out = result_of("correct", small_model(), *options)["held_out"]
        assert held_out["recovered_ci95"][0] < held_out["recovered"] < held_out["recovered_ci95"][1]

    def test_same_command_gives_the_same_bytes(self, correction, folder, monkeypatch):
        monkeypatch.chdir(folder)
        command = ["correct", MODEL, "--base", "nf4", "--calibration", "notes.txt", "--output", "again", *SIZES]
        assert call(*command, "--json").exit_code == 0
        for name in ("glowq.safetensors", "config.json", "README.md"):
            assert (folder / "again" / name).read_bytes() == (correction / name).read_bytes()
        command[1] = small_model()
        done = call(*command)
        assert done.exit_code == 0, done.stderr
        assert "held-out tokens" in done.stdout

    def test_loads_back_with_plain_transformers(self, correction):
        model = AutoModelForCausalLM.from_pretrained(correction)
        assert {name: entry.rank for name, entry in attached(model).items()} == {name: 8 for name in attached(model)}
        assert len(attached(model)) == 32
        assert AutoTokenizer.from_pretrained(correction).vocab_size == 4096

    def test_full_format_within_a_budget_from_a_quantized_model(self, quantized, notes, folder, correction):
        full = folder / "full"
        options = [*SIZES[2:], "--budget", "5%", "--format", "full"]
        result = result_of(
            "correct", quantized, "--reference", MODEL, "--calibration", notes, "--output", full, *options
        )
        assert 0.03 < result["overhead"] <= 0.05
        assert result_of("inspect", full)["kind"] == "full"
        assert result_of("inspect", full)["factor_bytes"] == result["factor_bytes"]
        assert (full / "tokenizer.json").is_file()
        assert (full / "README.md").is_file()
        model = AutoModelForCausalLM.from_pretrained(full)
        assert {entry.rank for entry in attached(model).values()} == set(result["ranks"].values())

    def test_resume_solves_only_what_was_not_finished(self, monkeypatch, correction, notes, folder):
        target, saved = folder / "resumed", []
        keep = Resume.save

        def save(self, block, factors):
            if len(saved) == 3:
                raise KeyboardInterrupt
            keep(self, block, factors)
            saved.append(block)

        monkeypatch.setattr(Resume, "save", save)
        command = ["correct", MODEL, "--base", "nf4", "--calibration", notes, "--output", target, *SIZES, "--resume"]
        assert call(*command).exit_code != 0
        assert not target.exists()
        blocks = sorted((folder / "resumed.resume").iterdir())
        assert len(blocks) == 3

        first, saved[:] = set(saved), []
        blocks[0].write_bytes(blocks[0].read_bytes()[:-100])
        monkeypatch.setattr(Resume, "save", lambda *found: keep(*found) or saved.append(found[1]))
        assert call(*command).exit_code == 0
        assert len(saved) == 6
        assert len(first.intersection(saved)) == 1  # the damaged one
        assert not (folder / "resumed.resume").exists()
        assert (target / "glowq.safetensors").read_bytes() == (correction / "glowq.safetensors").read_bytes()

    def test_encoder_is_corrected_without_held_out_figures(self, notes, folder):
        config = BertConfig(
            vocab_size=4096, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
        )
        torch.manual_seed(0)
        path = encoder(folder / "bert", BertModel(config))
        output = folder / "bert-out"
        done = call("correct", path, "--base", "nf4", "--calibration", notes, "--output", output, *SIZES, "--json")
        assert done.exit_code == 0, done.stderr
        assert json.loads(done.stdout)["held_out"] is None
        assert "glowq: note:" in done.stderr
        assert call("evaluate", path, "--data", notes).exit_code == 1


class TestEvaluate:
    def test_against_the_library(self, correction, quantized, folder, notes):
        done = fresh(folder, "evaluate", MODEL, quantized, correction, "--data", notes, *WIDTHS, "--json")
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert set(result) == {"models", "data_tokens", "pairs", "seed", "command"}
        reference, plain, ours = result["models"]
        assert [row["model"] for row in result["models"]] == [MODEL, str(quantized), str(correction)]
        assert result["data_tokens"] == 512
        assert (reference["kl"], reference["top1"]) == (0, 1)
        assert 0 < ours["kl"] < plain["kl"]

        ids = token_sequences(read_texts(notes), AutoTokenizer.from_pretrained(MODEL), length=64, limit=512)
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto").eval()
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss
        assert reference["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-3)
        assert reference["weight_bytes"] == 2 * model.num_parameters()
        factors = json.loads((correction / "config.json").read_text())["quantization_config"]
        values = sum(
            group["rank"] * (group["in_features"] + sum(group["out_features"])) for group in factors["groups"].values()
        )
        assert ours["weight_bytes"] - plain["weight_bytes"] == 2 * values
        for pair, row in zip(result["pairs"], (plain, ours), strict=True):
            assert pair["model"] == row["model"]
            assert pair["ppl_ratio"] == pytest.approx(row["perplexity"] / reference["perplexity"])
            assert pair["ci95"][0] <= pair["ppl_ratio"] <= pair["ci95"][1]

    def test_table_of_a_model_against_itself(self, notes):
        done = call("evaluate", MODEL, MODEL, "--data", notes, *WIDTHS)
        assert done.exit_code == 0, done.stderr
        assert "1.0000 [1.0000, 1.0000]" in done.stdout
        assert f"{MODEL} (2)" in done.stdout

    def test_cloze_items_of_two_models(self, quantized, notes):
        longer = ["--tokens", "960", "--sequence-length", "96", "--cloze", "8"]
        result = result_of("evaluate", MODEL, quantized, "--data", notes, *longer)
        assert (result["cloze"]["items"], result["cloze"]["over"]) == (8, MODEL)
        first, second = result["cloze"]["models"].values()
        assert first["gain"] is None
        assert second["gain"] == second["accuracy"] - first["accuracy"]
        done = call("evaluate", MODEL, MODEL, "--data", notes, *longer[:-1], "4")
        assert done.exit_code == 0, done.stderr
        assert "cloze" in done.stdout  # of fewer than eight items there is no interval

    def test_other_vocabulary_is_refused_before_loading(self, folder, notes):
        other = folder / "other-vocabulary"
        other.mkdir()
        stored = json.loads(Path(MODEL, "config.json").read_text())
        (other / "config.json").write_text(json.dumps({**stored, "vocab_size": 99}))
        done = call("evaluate", MODEL, other, "--data", notes)
        assert done.exit_code == 1
        assert re.fullmatch(r"glowq: error: .* vocabulary of 99 tokens .*\n", done.stderr)


class TestGroups:
    def test_llama(self, correction):
        found = result_of("groups", MODEL)
        assert found["groups"].pop()["members"] == ["lm_head"]  # quantizers skip it
        assert len(found["groups"]) == 32
        assert found["skipped"] == {}
        assert found["groups"][0] == {
            "name": "model.layers.0.self_attn.q_proj+k_proj+v_proj",
            "members": [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"],
            "in_features": 256,
            "out_features": [256, 128, 128],
            "block": "model.layers.0",
        }
        assert result_of("groups", correction)["groups"] == found["groups"]

    def test_table_of_an_encoder_decoder(self, folder):
        torch.manual_seed(0)
        model = T5Model(T5Config(vocab_size=99, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2))
        model.save_pretrained(folder / "t5")
        done = call("groups", folder / "t5")
        assert done.exit_code == 0, done.stderr
        assert "decoder.block.0.layer.0.SelfAttention.q+k+v" in done.stdout


class TestInspect:
    def test_correction(self, correction, corrected):
        made, found = json.loads(corrected[0].stdout), result_of("inspect", correction)
        assert (found["kind"], found["method"], found["seed"]) == ("correction", "glowq", 0)
        assert found["base"]["settings"]["bnb_4bit_quant_type"] == "nf4"
        assert found["base_model"]["name"] == MODEL
        assert found["base_model"]["fingerprint"].startswith("weights-sha256:")
        assert {group["name"]: group["rank"] for group in found["groups"]} == made["ranks"]
        assert all(found[key] == made[key] for key in ("factor_bytes", "base_bytes", "overhead"))
        assert all(group["gain"] == sum(group["gains"]) >= 0 for group in found["groups"])
        # Only a group that is worth nothing beside the others has no gain, and then none of its ranks has one.
        assert all(group["gain"] > 0 or not any(group["gains"]) for group in found["groups"])
        assert sum(group["gain"] > 0 for group in found["groups"]) > len(found["groups"]) / 2
        assert not any("energy_removed" in group for group in found["groups"])
        shown = call("inspect", correction).stdout
        assert "gain (nats)" in shown
        assert "model.layers.7.mlp.down_proj" in shown
        assert "base.settings.bnb_4bit_quant_type" in shown

    def test_other_folders(self, quantized):
        plain = result_of("inspect", MODEL)
        assert (plain["kind"], plain["architecture"], plain["dtype"]) == ("plain", "LlamaForCausalLM", "bfloat16")
        found = result_of("inspect", quantized)
        assert (found["kind"], found["base"]["quant_method"]) == ("quantized", "bitsandbytes")
        assert found["base"]["settings"]["load_in_4bit"]

    def test_damaged_files_are_refused(self, correction, tmp_path):
        broken = tmp_path / "broken"
        shutil.copytree(correction, broken)
        file = broken / "glowq.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        truncated = call("inspect", broken)
        file.unlink()
        missing = call("inspect", broken)
        assert (truncated.exit_code, missing.exit_code) == (1, 1)
        assert "truncated" in truncated.stderr
        assert "is missing" in missing.stderr


class TestRun:
    def test_script_in_a_fresh_process(self, folder):
        script = folder / "program.py"
        script.write_text(
            "import sys\nfrom transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known\n"
            "print(sys.argv[1:], __name__, 'glowq' in known)\nsys.exit(7)\n"
        )
        done = fresh(folder, "run", "program.py", "-m", "--json", "--help")
        assert done.returncode == 7
        assert done.stdout == "['-m', '--json', '--help'] __main__ True\n"

    def test_module_and_its_exception(self, tmp_path, monkeypatch):
        (tmp_path / "glowq_test_program.py").write_text(
            "import sys\nprint(sys.argv[1:])\nraise LookupError('its own')\n"
        )
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(sys, "argv", list(sys.argv))
        done = call("run", "-m", "glowq_test_program", "--flag")
        assert done.stdout == "['--flag']\n"
        assert isinstance(done.exception, LookupError)

    @pytest.mark.parametrize("arguments", [["no-such-script.py"], ["-m", "no_such.module"]])
    def test_missing_program(self, arguments, monkeypatch):
        monkeypatch.setattr(sys, "path", list(sys.path))
        done = call("run", *arguments)
        assert done.exit_code == 1
        assert done.stderr.startswith("glowq: error: no ")


class TestErrors:
    @pytest.fixture
    def places(self, tmp_path, notes):
        """Folders that commands must refuse, by the word that stands for them in a command line."""
        stored = json.loads(Path(MODEL, "config.json").read_text())
        for kind in ("bitsandbytes", "glowq"):
            settings = {"quant_method": kind, **({"load_in_4bit": True} if kind == "bitsandbytes" else {})}
            (tmp_path / kind).mkdir()
            (tmp_path / kind / "config.json").write_text(json.dumps({**stored, "quantization_config": settings}))
        (tmp_path / "pickled").mkdir()
        (tmp_path / "pickled" / "config.json").write_text(json.dumps(stored))
        (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
        (tmp_path / "full-folder").mkdir()
        (tmp_path / "full-folder" / "thesis.tex").write_text("years of work")
        (tmp_path / "out.resume").mkdir()
        (tmp_path / "out.resume" / "diary").write_text("years of life")
        names = {kind.upper(): tmp_path / kind for kind in ("bitsandbytes", "glowq", "pickled", "full-folder", "out")}
        return {**names, "MODEL": MODEL, "NOTES": notes, "NONE": tmp_path / "none" / "at" / "all"}

    @pytest.mark.parametrize(
        ("command", "message"),
        [
            ("correct NONE --base nf4 --calibration NOTES --output OUT", "none/at/all"),
            ("correct MODEL --base nf4 --calibration NONE --output OUT", "no file or folder"),
            ("correct MODEL --base nf4 --calibration NOTES --output FULL-FOLDER", "thesis.tex"),
            ("correct MODEL --base nf4 --calibration NOTES --output OUT --resume", "holds 'diary'"),
            ("correct MODEL --base nf4 --calibration NOTES --output OUT --reference NONE", "none/at/all"),
            ("correct MODEL --calibration NOTES --output OUT", "is not quantized"),
            ("correct BITSANDBYTES --calibration NOTES --output OUT", "give --reference"),
            ("correct BITSANDBYTES --base nf4 --calibration NOTES --output OUT", "leave out --base"),
            ("correct GLOWQ --reference MODEL --calibration NOTES --output OUT", "carries a glowq correction"),
            ("correct PICKLED --base nf4 --calibration NOTES --output OUT", "a pickle"),
            ("evaluate MODEL NONE --data NOTES", "none/at/all"),
            ("evaluate MODEL --data NONE", "no file or folder"),
            ("groups NONE", "none/at/all"),
            ("inspect NONE", "none/at/all"),
            ("inspect PICKLED", "a pickle"),
        ],
    )
    def test_failure_is_one_line_and_status_1(self, places, command, message):
        done = call(*(places.get(word, word) for word in command.split()), "--json")
        assert done.exit_code == 1
        assert done.stdout == ""
        assert re.fullmatch(r"glowq: error: [^\n]+\n", done.stderr)
        assert message in done.stderr
        assert not places["OUT"].exists()

    @pytest.mark.parametrize(
        "command",
        [
            "",
            "improve",
            "correct",
            "correct M --base nf4 --calibration F",
            "correct M --base nf4 --calibration F --output O --rank 8 --budget 1%",
            "correct M --base nf4 --calibration F --output O --rank 0",
            "correct M --base nf4 --calibration F --output O --budget much",
            "correct M --base nf4 --calibration F --output O --format zip",
            "correct M --base nf4 --calibration F --output O --seed -1",
            "correct M --base nf4 --calibration F --output O --distill much",
            "correct M --base nf4 --calibration F --output O --distill -1",
            "compare M --base nf4 --calibration F --data D --distill 1.5",
            "evaluate --data F",
            "evaluate M",
            "groups",
            "inspect A B",
            "run",
        ],
    )
    def test_wrong_usage_is_status_2(self, command):
        assert call(*command.split()).exit_code == 2

    @pytest.mark.parametrize(
        ("command", "message"),
        [
            ("correct M --base nf5 --calibration F --output O", "unknown base quantizer 'nf5'"),
            ("correct M --base nf4 --calibration F --output O --method magic", "method must be one of"),
            ("compare M --base nf4 --calibration F --data D --methods lqer,magic", "method must be one of aser, "),
            ("import A --base-model M --base nf5 --output O", "Did you mean 'nf4'?"),
            ("export C --to onyx --output O", "no export format 'onyx'. Did you mean 'onnx'?"),
        ],
    )
    def test_a_name_that_is_not_known_is_wrong_usage(self, command, message):
        done = call(*command.split())
        assert done.exit_code == 2
        assert done.stdout == ""
        assert message in done.stderr

    def test_a_bug_is_not_dressed_up(self, monkeypatch):
        monkeypatch.setattr(sys.modules["glowq.cli.commands.groups"], "load_config", lambda name: 1 // 0)
        assert isinstance(call("groups", MODEL).exception, ZeroDivisionError)


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_example_uses_options_that_exist(self, command):
        done = call(command, "--help")
        assert done.exit_code == 0
        described, _, options = done.stdout.partition("Options:")
        examples = [shlex.split(line) for line in described.splitlines() if line.startswith("    glowq ")]
        assert examples
        for example in examples:
            assert example[1] == command
            own = example[: example.index("-m") + 1] if command == "run" else example
            assert all(word in options for word in own if word.startswith("-"))

    def test_version(self):
        assert call("--version").stdout == f"glowq {glowq.__version__}\n"
