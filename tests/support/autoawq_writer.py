"""Checkpoints by autoawq 0.2.9's own commands, for tests/quantizers/test_autoawq.py.

autoawq lives in an environment of its own, which glowq is not installed in. So this runs twice:

    python -m support.autoawq_writer prepare SOURCE           in the tests' environment: the model, and text
    python -m support.autoawq_writer quantize SOURCE TARGET   in autoawq's environment: two checkpoints

TARGET/as-on-gpu is what autoawq writes where its search runs on a GPU. TARGET/damaged-by-cpu is what it writes without
one: it keeps the weights to restore with `.cpu()`, which copies nothing there, and then multiplies them in place. Each
linear layer that it folds scales into ends up with those of the first try in its columns as well, divided out of
nothing: another model than the source. (https://github.com/mit-han-lab/llm-awq/issues/28 is about the same lines.)
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

CONFIG = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
SAMPLES = 32
TEXTS = "calibration.json"


def prepare(source: Path) -> None:
    """Two blocks of the bundled model, and what the tests' other libraries calibrate on."""
    from support import writers
    from support.bases import small_model

    shutil.copytree(small_model(), source, dirs_exist_ok=True)
    (source / TEXTS).write_text(json.dumps(writers.TEXTS))


def quantize(source: Path, target: Path) -> None:
    """As autoawq's readme has it: 4 bits in groups of 64, scales searched and folded, weights clipped."""
    from awq.quantize.quantizer import AwqQuantizer

    class CopyingQuantizer(AwqQuantizer):
        """autoawq's quantizer, whose search restores copies, as it does on a GPU."""

        def _compute_best_scale(self, x: Any, w_mean: Any, x_mean: Any, module: Any, *rest: Any) -> Any:
            handle = module.register_state_dict_post_hook(_copy)
            try:
                return super()._compute_best_scale(x, w_mean, x_mean, module, *rest)
            finally:
                handle.remove()

    _write(source, target / "as-on-gpu", CopyingQuantizer)
    _write(source, target / "damaged-by-cpu", AwqQuantizer)


def _copy(module: Any, state: dict[str, Any], *rest: Any) -> None:
    for name, tensor in state.items():
        state[name] = tensor.clone()


def _write(source: Path, target: Path, quantizer: type) -> None:
    from awq import AutoAWQForCausalLM
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoAWQForCausalLM.from_pretrained(str(source))
    # A list, because the default is a dataset on the Hub. Texts of more than 512 tokens are left out.
    settings = {"calib_data": json.loads((source / TEXTS).read_text()), "max_calib_samples": SAMPLES}
    model.quantize(tokenizer, quant_config=CONFIG, quantizer_cls=quantizer, **settings)
    model.save_quantized(str(target))
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    {"prepare": prepare, "quantize": quantize}[sys.argv[1]](*map(Path, sys.argv[2:]))
