"""Read a model's config.json and the headers of its safetensors files, but not its weights."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CorrectionError, ModelNotFoundError
from ..quantizers.base import StoredModule
from ..utils.files import check_regular, checkpoint_files, refuse_irregular, refuse_pickles
from ..utils.snapshots import local_snapshot
from .model_config import read_model_config

if TYPE_CHECKING:
    from huggingface_hub.utils._safetensors import SafetensorsFileMetadata

__all__ = ["Headers", "read_headers"]

_INDEX = "model.safetensors.index.json"
_HQQ_PICKLE = "qmodel.pt"  # HQQ's save function writes this file and a config.json that does not mention HQQ


@dataclass(frozen=True)
class Headers:
    """The config and the headers of a model folder or Hub repository.

    Attributes:
        config: content of config.json; empty if there is none.
        shapes: tensor name -> shape.
        dtypes: tensor name -> dtype as safetensors writes it ("BF16").
        sizes: tensor name -> bytes.
        metadata: what libraries wrote into the headers.
        gguf: names of the GGUF files, if the folder has no config.json.
        hqq: whether the weights are a pickle that HQQ wrote.
    """

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    gguf: tuple[str, ...] = ()
    hqq: bool = False

    def add(self, name: str, shape: Sequence[int], dtype: str, offsets: Sequence[int]) -> None:
        """Add a tensor, as the header of a safetensors file describes it."""
        self.shapes[name], self.dtypes[name] = tuple(shape), dtype
        self.sizes[name] = offsets[1] - offsets[0]

    def modules(self) -> dict[str, StoredModule]:
        """Module name -> its tensors. The tensor "m.weight.absmax" of bitsandbytes belongs to m, as "m.weight" does."""
        local: dict[str, dict[str, str]] = defaultdict(dict)  # module name -> name under it -> tensor name
        for name in self.shapes:
            module, found, rest = name.partition(".weight.")
            if not found:
                module, _, rest = name.rpartition(".")
            local[module]["weight." + rest if found else rest] = name
        for name in self.metadata:
            module, _, rest = name.rpartition(".")
            local[module].setdefault(rest, name)
        return {
            module: StoredModule(
                module,
                {rest: self.dtypes[name] for rest, name in names.items() if name in self.dtypes},
                {rest: self.shapes[name] for rest, name in names.items() if name in self.shapes},
                {rest: self.metadata[name] for rest, name in names.items() if name in self.metadata},
                {rest: self.sizes[name] for rest, name in names.items() if name in self.sizes},
            )
            for module, names in local.items()
            if module
        }


def read_headers(name: str) -> Headers:
    """Read the headers of a folder, a GGUF file or a Hub repository; the weights are not downloaded.

    Raises:
        ModelNotFoundError: the model does not exist, or a shard that its index names is missing.
        PickleRefusedError: the weights are pickles that HQQ did not write.
        CorrectionError: a file is corrupt or truncated.
    """
    path = Path(name)
    if path.suffix == ".gguf" and path.is_file():
        return Headers({}, gguf=(path.name,))
    if not path.is_dir():
        return _read_hub(name)
    gguf = _gguf_files(entry.name for entry in path.iterdir())
    if gguf:
        return Headers({}, gguf=gguf)
    refuse_irregular(path)
    config = read_model_config(path / "config.json")
    if (path / _HQQ_PICKLE).is_file():
        return Headers(config, hqq=True)
    refuse_pickles(path)
    files = [Path(file) for file in checkpoint_files(path)] if (path / _INDEX).is_file() else []
    return _merge(config, [_of_file(file) for file in files or sorted(path.glob("*.safetensors"))])


def _read_hub(name: str) -> Headers:
    """Read the headers from the Hub, or from the cache if the Hub cannot be reached."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    api = HfApi()
    try:
        files = api.list_repo_files(name)
        gguf = _gguf_files(files)
        if gguf:
            return Headers({}, gguf=gguf)
        config = read_model_config(Path(hf_hub_download(name, "config.json")))
        if _HQQ_PICKLE in files:
            return Headers(config, hqq=True)
        weights = [file for file in files if file.endswith(".safetensors")]
        found = [_of_hub(api.parse_safetensors_file_metadata(name, file)) for file in weights]
    except HFValidationError as error:
        raise ModelNotFoundError(f"{name!r} is neither a folder nor the name of a Hub repository.") from error
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        return read_headers(str(local_snapshot(name, local_files_only=True)))
    return _merge(config, found)


def _gguf_files(names: Iterable[str]) -> tuple[str, ...]:
    names = set(names)
    return () if "config.json" in names else tuple(sorted(name for name in names if name.endswith(".gguf")))


def _of_hub(header: SafetensorsFileMetadata) -> Headers:
    """The tensors of a file on the Hub."""
    found = Headers({}, metadata=header.metadata or {})
    for name, info in header.tensors.items():
        found.add(name, info.shape, info.dtype, info.data_offsets)
    return found


def _of_file(file: Path) -> Headers:
    """The tensors of a local file."""
    from safetensors import SafetensorError, safe_open

    if check_regular(file) is None:
        raise ModelNotFoundError(f"{file} is missing; download the model again.")
    try:
        with safe_open(file, framework="numpy"):  # checks the header, also against the file's size
            pass
    except SafetensorError as error:
        raise CorrectionError(f"{file} is corrupt or truncated ({error}); download it again.") from error
    with file.open("rb") as stream:  # importing huggingface_hub, which can do this too, takes longer
        stored = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    found = Headers({}, metadata=stored.pop("__metadata__", None) or {})
    for name, info in stored.items():
        found.add(name, info["shape"], info["dtype"], info["data_offsets"])
    return found


def _merge(config: dict[str, Any], files: Iterable[Headers]) -> Headers:
    merged = Headers(config)
    for file in files:
        for fields in ("shapes", "dtypes", "sizes", "metadata"):
            getattr(merged, fields).update(getattr(file, fields))
    return merged
