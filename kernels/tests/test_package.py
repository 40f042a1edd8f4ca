"""The kernel project as a whole: Hugging Face's `kernels` library loads its sources and reads its settings."""

from __future__ import annotations

import ast
import inspect
import json
import shutil
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from arguments import VALID
from torch import Tensor

import glowq_kernels
from glowq_kernels import twins

PROJECT = Path(__file__).parents[1]
SOURCES = PROJECT / "torch-ext" / "glowq_kernels"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository as on the Hub, with one build per backend from which `kernels` chooses."""
    settings = tomllib.loads((PROJECT / "build.toml").read_text())["general"]
    for backend in (*settings["backends"], "cpu"):  # "cpu" is for triton's interpreter and is not published
        build = tmp_path / "build" / f"torch-{backend}"
        shutil.copytree(SOURCES, build, ignore=shutil.ignore_patterns("__pycache__"))
        metadata = {
            "name": settings["name"],
            "id": f"_glowq_kernels_{backend}_test",
            "version": settings["version"],
            "license": settings["license"],
            "python-depends": [],
            "backend": {"type": backend},
        }
        (build / "metadata.json").write_text(json.dumps(metadata))
    return tmp_path


def test_the_kernels_library_loads_and_runs_it(repository: Path, device: torch.device) -> None:
    kernels = pytest.importorskip("kernels")
    if kernels.__file__ is None:  # the folder kernels/ of this project, found on sys.path
        pytest.skip("needs Hugging Face's kernels, which `make test-kernels` installs")
    loaded = kernels.get_local_kernel(repository)
    assert loaded is not glowq_kernels
    assert loaded.__file__.startswith(str(repository))
    assert sorted(loaded.__all__) == sorted(glowq_kernels.__all__)
    assert loaded.unavailable() is None
    x, right = torch.randn(2, 40, device=device), torch.randn(3, 40, device=device)
    assert torch.equal(loaded.right(x, right), glowq_kernels.right(x, right))
    with pytest.raises(loaded.KernelError):
        loaded.right(x, right[:, 1:])


def test_the_kernels_library_reads_its_settings() -> None:
    rust = pytest.importorskip("kernels._rust")
    build = rust.Build.open(PROJECT)
    assert [str(backend).lower().rpartition(".")[2] for backend in build.general.backends] == ["cuda", "rocm", "xpu"]


def test_sources_import_only_what_a_kernel_may() -> None:
    """Sources import only the standard library, torch, and the package itself by relative names.

    Relative imports allow several versions of the package to be loaded at once.
    """
    for source in SOURCES.glob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Import):
                names = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = {node.module.partition(".")[0]}
            else:
                continue
            foreign = names - sys.stdlib_module_names - {"torch"}
            # Outside the triton_* files, only `unavailable` and `interpreted` import triton, inside the function.
            assert foreign <= ({"triton"} if source.stem.startswith(("triton_", "availability")) else set())


def test_the_project_is_no_package() -> None:
    """A package named `kernels` would hide Hugging Face's own library."""
    assert not (PROJECT / "__init__.py").exists()


@pytest.mark.parametrize("name", twins.__all__)
def test_a_torch_version_has_the_signature_of_its_kernel(name: str) -> None:
    assert inspect.signature(getattr(twins, name)) == inspect.signature(getattr(glowq_kernels, name))


@pytest.mark.parametrize("name", ["right", "gptq_linear", "nf4_linear"])
def test_outputs_start_as_nan_where_that_is_tested(
    poisoned: list[Tensor], monkeypatch: pytest.MonkeyPatch, device: torch.device, name: str
) -> None:
    """The fixture `poisoned`, which other tests rely on, does fill the outputs that the launchers allocate."""
    module = {"right": "right_product", "gptq_linear": "gptq", "nf4_linear": "nf4"}[name]
    silent = type("Silent", (), {"launch": staticmethod(lambda *arguments, **options: None)})
    monkeypatch.setattr(f"glowq_kernels.{module}.kernels", lambda *arguments: silent)
    arguments = VALID[name]()
    assert getattr(glowq_kernels, name)(**arguments).isnan().all()
    assert len(poisoned) == 2
