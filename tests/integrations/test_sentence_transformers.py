"""sentence-transformers loads a corrected encoder like any other encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

import glowq
from glowq.quantizers.registry import base_config
from support.cli import fresh
from support.tiny import CALIBRATION, TEXTS

SENTENCES = ["import os", "def area(width, height): return width * height", "class Reader"]


@pytest.fixture(scope="module")
def encoder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both forms of a corrected Bert."""
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = AutoTokenizer.from_pretrained(source)
    sizes = {"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    torch.manual_seed(0)
    BertModel(BertConfig(num_attention_heads=2, **sizes)).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    model = AutoModel.from_pretrained(folder / "bert", quantization_config=base_config("torchao-int3"))
    options = {"reference": str(folder / "bert"), "calibration": TEXTS, "tokenizer": tokenizer, "rank": 8}
    glowq.correct(model, **options, **CALIBRATION).save_pretrained(folder / "correction")
    model.save_pretrained(folder / "full")
    tokenizer.save_pretrained(folder / "full")
    return folder


def embeddings(folder: Path, *, corrected: bool = True) -> torch.Tensor:
    """Return the mean of the final token states of each sentence, computed one by one with plain transformers."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    glowq.set_enabled(model, corrected)
    with torch.no_grad():
        states = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state for text in SENTENCES]
    return torch.cat([state.mean(1) for state in states])


@pytest.mark.parametrize("form", ["correction", "full"])
def test_embeddings_are_those_of_the_corrected_model(encoder: Path, form: str) -> None:
    model = SentenceTransformer(str(encoder / form), device="cpu")
    found = torch.stack([model.encode(text, convert_to_tensor=True) for text in SENTENCES])
    torch.testing.assert_close(found, embeddings(encoder / form), rtol=1e-5, atol=1e-6)
    assert float((found - embeddings(encoder / form, corrected=False)).abs().max()) > 1e-3


def test_a_program_that_knows_nothing_of_glowq(encoder: Path, tmp_path: Path) -> None:
    (tmp_path / "embed.py").write_text(
        "import sys\nfrom sentence_transformers import SentenceTransformer\n"
        "model = SentenceTransformer(sys.argv[1], device='cpu')\n"
        "print(*model.encode('import os').tolist())\n"
    )
    done = fresh(tmp_path, "run", "embed.py", encoder / "correction")
    assert done.returncode == 0, done.stderr
    found = torch.tensor([float(value) for value in done.stdout.split()])
    torch.testing.assert_close(found, embeddings(encoder / "correction")[0], rtol=1e-5, atol=1e-6)
