"""From text to token batches, with the public functions and the tokenizer of the bundled model."""

import hashlib
import json
import re
import sysconfig
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from glowq.data.inputs import batches, split
from glowq.data.text import check_source, read_texts
from glowq.data.tokens import sequences_of, token_sequences
from glowq.errors import CalibrationError, ConfigError, ModelNotFoundError, TokenizerMismatchError

MODEL = Path(__file__).parents[2] / "examples" / "stdlib-llama"
VOCABULARY = 4096


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def numbered():
    """200 documents, each with its own number and about 20 tokens or more."""
    return [f"item{number:03d} = " + "x + " * 20 for number in range(200)]


class TestReadTexts:
    def test_list_keeps_its_order_and_drops_blank_documents(self):
        assert read_texts(["b", " \n", "a", ""]) == ["b", "a"]

    def test_file_is_one_document(self, tmp_path):
        path = tmp_path / "notes.txt"
        path.write_text("one\n\ntwo: é\n", encoding="utf-8")
        assert read_texts(path) == read_texts(str(path)) == ["one\n\ntwo: é\n"]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (
                '{"text": "half a character: \\ud83d"}',
                r"text 1 holds bytes that could not be decoded \(lone surrogates\)",
            ),
            (
                '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}",
                r'rows\.jsonl:2: expected a JSON object with a field "text" or',
            ),
        ],
        ids=["surrogate", "deep"],
    )
    def test_a_record_that_no_tokenizer_takes(self, tmp_path, line, message):
        path = tmp_path / "rows.jsonl"
        path.write_text('{"text": "x"}\n' + line)
        with pytest.raises(CalibrationError, match=message):
            read_texts(path)
        if "ud83d" in line:
            with pytest.raises(CalibrationError, match=message):
                read_texts(["x", json.loads(line)["text"]])

    def test_jsonl_is_one_document_a_line(self, tmp_path):
        path = tmp_path / "rows.jsonl"
        rows = [{"text": "first\u2028still first"}, {"id": 1, "text": "second"}]
        path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
        assert read_texts(path) == ["first\u2028still first", "second"]

    def test_folder_is_read_by_relative_path_and_suffix(self, tmp_path):
        files = {
            "b.txt": "b",
            "a/z.md": "z",
            "a/c.py": "c",
            "a.jsonl": '{"text": "j"}',
            "weights.bin": "no",
            "a/d": "no",
        }
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        assert read_texts(tmp_path) == ["j", "c", "z", "b"]

    def test_standard_library_parts_follow_the_rule(self):
        train, held_out = read_texts("python-stdlib"), read_texts("python-stdlib:held-out")
        assert len(train) > 10 * len(held_out) > 0
        assert read_texts("python-stdlib:held-out") == held_out
        # The parts share no path, but a few files with different paths have the same text.
        shared = set(train) & set(held_out)
        assert len(shared) <= 2
        for name in ("json/decoder.py", "argparse.py", "ast.py"):
            text = (Path(sysconfig.get_paths()["stdlib"]) / name).read_text(encoding="utf-8")
            is_held_out = int(hashlib.sha1(name.encode()).hexdigest(), 16) % 50 == 0
            assert (text in held_out, text in train) == (is_held_out, not is_held_out)

    @pytest.mark.parametrize("source", [[], ["", " \n\t"]], ids=["no-documents", "blank-documents"])
    def test_nothing_to_read(self, source):
        with pytest.raises(CalibrationError, match="the list of texts holds no text"):
            read_texts(source)

    def test_empty_file_and_folder_are_named(self, tmp_path):
        (tmp_path / "empty.txt").touch()
        with pytest.raises(CalibrationError, match=r"empty\.txt holds no text"):
            read_texts(tmp_path / "empty.txt")
        with pytest.raises(CalibrationError, match="holds no text"):
            read_texts(tmp_path)

    def test_items_other_than_str(self):
        with pytest.raises(CalibrationError, match="expected every text to be str, found int at 1"):
            read_texts(["a", 2])

    @pytest.mark.parametrize(
        "source", ["notes.txt", "some/folder/notes.txt", "folder/notes.txt", "text itself, by mistake"]
    )
    def test_missing_file(self, source, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ModelNotFoundError, match=r"no file or folder .* give a list of strings"):
            read_texts(source)

    def test_undecodable_file_is_named(self, tmp_path):
        (tmp_path / "good.txt").write_text("good")
        (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
        with pytest.raises(CalibrationError, match=r"latin\.txt is not UTF-8 text \(byte 3\)"):
            read_texts(tmp_path)

    @pytest.mark.parametrize("line", ["{", "[1]", '"text"', '{"content": "a"}'])
    def test_bad_record_is_named_by_line(self, line, tmp_path):
        path = tmp_path / "rows.jsonl"
        path.write_text('{"text": "a"}\n' + line)
        with pytest.raises(CalibrationError, match=r'rows\.jsonl:2: expected a JSON object with a field "text" or'):
            read_texts(path)


class TestReadDataset:
    @pytest.fixture
    def requests(self, monkeypatch):
        """The calls of `datasets.load_dataset`, which is replaced by a function that returns a small data set."""
        import datasets

        calls = []

        def load_dataset(name, config, *, split):
            calls.append((name, config, split))
            return datasets.Dataset.from_dict({"text" if name != "org/other" else "content": ["a", "", "b"]})

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    @pytest.mark.parametrize(
        ("name", "call"),
        [
            ("org/name", ("org/name", None, "train")),
            ("org/name:cfg", ("org/name", "cfg", "train")),
            ("org/name:cfg:test", ("org/name", "cfg", "test")),
            ("org/name::train[:10]", ("org/name", None, "train[:10]")),
        ],
    )
    def test_name_holds_config_and_split(self, name, call, requests):
        assert read_texts(name) == ["a", "b"]
        assert requests == [call]

    def test_no_text_column(self, requests):
        with pytest.raises(CalibrationError, match=r"'org/other' has no column \"text\" or .*, only \['content'\]"):
            read_texts("org/other")

    def test_cannot_be_loaded(self, monkeypatch):
        import datasets

        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(ModelNotFoundError, match="'org/absent' is no file here and no dataset that can be loaded"):
            read_texts("org/absent")


class TestTokenSequences:
    def test_everything_in_order_joined_with_eos(self, tokenizer):
        texts = ["import os", "def f(x):\n    return x", "import sys"]
        sequences = token_sequences(texts, tokenizer, length=3)
        stream = [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
        assert sequences.dtype == torch.int64
        assert sequences.shape == (len(stream) // 3, 3)
        assert sequences.flatten().tolist() == stream[: len(stream) // 3 * 3]

    def test_tokenizer_without_eos_joins_directly(self, tokenizer):
        bare = AutoTokenizer.from_pretrained(MODEL, eos_token=None)
        assert bare.eos_token_id is None
        assert (token_sequences(["import os"] * 20, bare, length=4) != tokenizer.eos_token_id).all()

    @pytest.mark.parametrize("limit", [64, 100, 1000])
    def test_limit_bounds_the_tokens(self, limit, tokenizer, numbered):
        assert token_sequences(numbered, tokenizer, length=16, limit=limit).shape == (limit // 16, 16)

    def test_limit_above_the_text_returns_all_of_it(self, tokenizer):
        texts = ["import os\n" * 40]
        everything = token_sequences(texts, tokenizer, length=8)
        assert torch.equal(token_sequences(texts, tokenizer, length=8, limit=10**6), everything)

    def test_seed_decides(self, tokenizer, numbered):
        first, again, other = (token_sequences(numbered, tokenizer, length=16, limit=320, seed=s) for s in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_sample_is_spread_over_all_documents(self, tokenizer, numbered):
        text = tokenizer.decode(token_sequences(numbered, tokenizer, length=32, limit=3200).flatten())
        found = [number for number in range(200) if f"item{number:03d}" in text]
        assert min(found) < 40
        assert max(found) >= 160
        assert sum(number < 100 for number in found) > len(found) / 4
        assert sum(number >= 100 for number in found) > len(found) / 4

    def test_one_long_document_is_sampled_throughout(self, tokenizer):
        text = "\n".join(f"line{number:06d} = {number}" for number in range(100_000))
        sample = token_sequences([text], tokenizer, length=64, limit=64 * 200)
        found = [int(number) for number in re.findall(r"line(\d{6})", tokenizer.decode(sample.flatten()))]
        assert min(found) < 30_000
        assert max(found) > 70_000

    def test_small_limit_reads_little(self, numbered):
        class Counting:
            eos_token_id = 0
            name_or_path = "counting"
            seen = 0

            def __call__(self, texts, **_):
                self.seen += len(texts)
                return {"input_ids": [[1] * 50 for _ in texts]}

        tokenizer = Counting()
        token_sequences(numbered * 50, tokenizer, length=16, limit=160)
        assert tokenizer.seen < 100

    def test_too_little_text_counts_both(self, tokenizer):
        with pytest.raises(CalibrationError, match="needed 512 tokens for one sequence, found 4 in 2 documents"):
            token_sequences(["import", "import"], tokenizer, length=512)

    def test_limit_below_one_sequence(self, tokenizer, numbered):
        with pytest.raises(CalibrationError, match="one sequence of 64 tokens, found a limit of 63 tokens"):
            token_sequences(numbered, tokenizer, length=64, limit=63)

    def test_length_below_one(self, tokenizer, numbered):
        with pytest.raises(ConfigError, match="length must be at least 1 token, found 0"):
            token_sequences(numbered, tokenizer, length=0)

    def test_tokenizer_of_another_model(self, tokenizer, numbered):
        largest = int(token_sequences(numbered, tokenizer, length=16, vocab_size=VOCABULARY).max())
        token_sequences(numbered, tokenizer, length=16, vocab_size=largest + 1)
        with pytest.raises(
            TokenizerMismatchError, match=f"stdlib-llama gave id {largest}, the model knows 0 to {largest - 1}"
        ):
            token_sequences(numbered, tokenizer, length=16, vocab_size=largest)


class TestBatches:
    def test_shapes_and_masks(self):
        sequences = torch.arange(35).view(7, 5)
        found = list(batches(sequences, 3))
        assert [tuple(batch["input_ids"].shape) for batch in found] == [(3, 5), (3, 5), (1, 5)]
        assert torch.equal(torch.cat([batch["input_ids"] for batch in found]), sequences)
        assert all(torch.equal(batch["attention_mask"], torch.ones_like(batch["input_ids"])) for batch in found)

    def test_batch_size_below_one(self):
        with pytest.raises(ConfigError, match="batch_size must be at least 1, found 0"):
            list(batches(torch.zeros(2, 2, dtype=torch.int64), 0))


class TestSplit:
    @pytest.mark.parametrize(("count", "fraction", "held"), [(10, 0.2, 2), (10, 0.001, 1), (10, 0.999, 9), (2, 0.5, 1)])
    def test_parts_are_disjoint_and_complete(self, count, fraction, held):
        sequences = torch.arange(count * 4).view(count, 4)
        train, held_out = split(sequences, fraction)
        assert held_out.shape == (held, 4)
        rows = [tuple(row) for part in (train, held_out) for row in part.tolist()]
        assert sorted(rows) == [tuple(row) for row in sequences.tolist()]

    def test_seed_decides(self):
        sequences = torch.arange(100).view(50, 2)
        assert torch.equal(split(sequences, 0.5, seed=3)[1], split(sequences, 0.5, seed=3)[1])
        assert not torch.equal(split(sequences, 0.5, seed=3)[1], split(sequences, 0.5, seed=4)[1])

    def test_too_few_sequences(self):
        with pytest.raises(CalibrationError, match="needed 2 sequences to hold one out, found 1"):
            split(torch.zeros(1, 8, dtype=torch.int64), 0.5)

    @pytest.mark.parametrize("fraction", [0, 1, -0.5, float("nan")])
    def test_fraction_outside_its_range(self, fraction):
        with pytest.raises(ConfigError, match="must lie between 0 and 1"):
            split(torch.zeros(4, 8, dtype=torch.int64), fraction)


class TestSeveralSources:
    @pytest.fixture
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "long.txt").write_text("alpha beta gamma " * 3000)
        (tmp_path / "short.txt").write_text("1 2 3 4 5 6 7 8 9 0 " * 400)
        return tmp_path

    def test_each_gives_an_equal_part(self, folder, tokenizer):
        both = sequences_of("long.txt, short.txt", tokenizer, length=32, limit=1024)
        alone = [
            token_sequences(read_texts(name), tokenizer, length=32, limit=512) for name in ("long.txt", "short.txt")
        ]
        assert both.shape == (32, 32)
        assert torch.equal(both, torch.cat(alone))

    def test_one_that_is_too_short_gives_all_that_it_has(self, folder, tokenizer):
        (folder / "tiny.txt").write_text("x + " * 20)
        found = sequences_of("long.txt,tiny.txt", tokenizer, length=16, limit=1024)
        assert len(found) == 32 + len(token_sequences(read_texts("tiny.txt"), tokenizer, length=16))

    def test_a_file_may_have_a_comma_in_its_name(self, folder, tokenizer):
        (folder / "a,b.txt").write_text("one text")
        assert read_texts("a,b.txt") == ["one text"]
        check_source("a,b.txt")
        assert len(sequences_of("a,b.txt", tokenizer, length=2, limit=None)) >= 1

    def test_the_one_that_is_missing_is_named(self, folder, tokenizer):
        for name in ("long.txt,gone.txt", "gone.txt,long.txt"):
            for read in (check_source, lambda name: sequences_of(name, tokenizer, length=16, limit=None)):
                with pytest.raises(ModelNotFoundError, match=r"no file or folder 'gone\.txt'"):
                    read(name)
        with pytest.raises(ModelNotFoundError, match="no file or folder ''"):
            sequences_of("long.txt,", tokenizer, length=16, limit=None)
