"""Fixtures for all tests: the bundled model, tiny models built from configs, random corrections."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from glowq.factors.factors import GroupFactors
from glowq.factors.group import Group
from glowq.models.tracing import find_groups
from glowq.runtime.attach import attach
from glowq.utils.processor import forced
from support import tiny, writers
from support.store import open_store

BUNDLED = Path(__file__).parents[1] / "examples" / "stdlib-llama"
TEXT = "def read(path: str) -> bytes:\n    with open(path, 'rb') as file:\n        return file.read()\n\n" * 12

Factory = Callable[..., Any]
COMMIT = "a" * 40

# The benchmarks calibrate the quantization libraries on all texts, the tests on an eighth of them. That is 3,800
# tokens, nearly five for each of the 768 inputs of the widest layer, and saves minutes with GPTQ and AWQ.
writers.TEXTS = writers.TEXTS[::8]


def pytest_configure(config: pytest.Config) -> None:
    """Set the folder in which all processes of this run and later runs keep models that take long to quantize."""
    if not hasattr(config, "workerinput"):
        open_store(BUNDLED.parents[1] / "build" / "test-models", BUNDLED, writers.TEXTS)
        config.option.loadscopereorder = False  # pytest-xdist orders files only by their numbers of tests


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run files with slow tests first, then files with many tests, so that no process runs a long file at the end.

    Tests marked `long` or `fuzz` are left out, unless -m names the mark.
    """
    for mark in ("long", "fuzz"):
        if mark not in config.option.markexpr:
            left_out = [item for item in items if item.get_closest_marker(mark)]
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if not item.get_closest_marker(mark)]
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in slow, -tests[item.path], str(item.path)))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    logging.disable_progress_bar()


@pytest.fixture(scope="module")
def uncompiled() -> Iterator[None]:
    """Run gptqmodel's dequantization without torch.compile.

    gptqmodel compiles it again for every module of every model, which takes seconds each, until torch stops after
    eight. The order of the tests in a process would then decide which of them run compiled code.
    `quantizers/test_reading.py` does not use this fixture and runs compiled code.
    """
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def half_products() -> Iterator[None]:
    """Compute in half precision on every processor, as one with AVX512-BF16 does, where a test expects its rounding."""
    with forced(False):
        yield


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no accelerator")
    return torch.device(request.param)


@pytest.fixture(scope="session")
def bundled() -> Path:
    """Folder of the bundled Llama with 8 blocks and hidden size 256."""
    return BUNDLED


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BUNDLED)


@pytest.fixture(scope="session")
def token_ids(tokenizer: Any) -> Tensor:
    """Token ids of real text, shape (4, 48)."""
    return tokenizer(TEXT, return_tensors="pt").input_ids[:, : 4 * 48].reshape(4, 48)


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random full-precision Llama of two layers. Tests do not change it."""
    return tiny.tiny_llama(tmp_path_factory.mktemp("source") / "llama")


@pytest.fixture(scope="session")
def rank_8(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a rank-8 correction of `source` quantized to nf4. Tests do not change it."""
    saved = tmp_path_factory.mktemp("saved") / "correction"
    tiny.corrected(source, "nf4", rank=8)[1].save_pretrained(saved)
    return saved


@pytest.fixture(scope="session")
def compared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with model/ (a random Llama of two layers), train.txt and test.txt. Tests do not change it."""
    folder = tmp_path_factory.mktemp("compared")
    tiny.tiny_llama(folder / "model")
    tiny.library_texts(folder)
    return folder


@pytest.fixture
def tiny_llama() -> Factory:
    """A function that builds a random Llama in evaluation mode: 2 blocks, hidden size 32, vocabulary 64."""

    def build(**changes: Any) -> LlamaForCausalLM:
        settings: dict[str, Any] = {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,
        }
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()

    return build


@pytest.fixture
def tiny_ids() -> Tensor:
    """Token ids below 64, shape (2, 7)."""
    return torch.randint(1, 64, (2, 7), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="session")
def random_factors() -> Factory:
    """A function that builds random factors for a group, large enough to change the outputs of the model."""

    def build(group: Group, rank: int = 3, dtype: torch.dtype = torch.float32, scale: float = 0.3) -> GroupFactors:
        generator = torch.Generator().manual_seed(len(group.name))

        def draw(*shape: int) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(dtype)

        lefts = {m: draw(width, rank) for m, width in zip(group.members, group.out_features, strict=True)}
        return GroupFactors(
            group, draw(rank, group.in_features), lefts, torch.ones(rank, dtype=torch.float64), float(rank)
        )

    return build


class Trio(nn.Module):
    """Three linear layers that read the same input, of width eight."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 6), nn.Linear(8, 4), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


@pytest.fixture
def trio(random_factors: Factory) -> Trio:
    """A group of three modules with a correction attached."""
    model = Trio()
    attach(model, random_factors(Group("q+k+v", ("q", "k", "v"), 8, (6, 4, 5), "")))
    return model


@pytest.fixture(scope="session")
def correct_randomly(random_factors: Factory) -> Factory:
    """A function that attaches random factors to every group of a model and returns them."""

    def build(model: nn.Module, ids: Tensor, **options: Any) -> list[GroupFactors]:
        factors = [random_factors(group, **options) for group in find_groups(model, {"input_ids": ids})]
        for entry in factors:
            attach(model, entry)
        return factors

    return build


@pytest.fixture(scope="session")
def fold() -> Factory:
    """A function that writes W + A B into the weights of a dense model: the reference for its corrected outputs."""

    def write(model: nn.Module, factors: list[GroupFactors]) -> nn.Module:
        with torch.no_grad():
            for entry in factors:
                for member, left in entry.lefts.items():
                    weight = model.get_submodule(member).weight
                    weight.add_((left.double() @ entry.right.double()).to(weight))
        return model

    return write


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], None]:
    """A function that puts a folder into the Hub's cache under a repository name, as if it had been downloaded."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def publish(name: str, folder: Path, revision: str = "main", commit: str = COMMIT) -> None:
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        shutil.copytree(folder, repository / "snapshots" / commit)

    return publish
