"""Write checkpoints with the commands of autoawq 0.2.9, for tests/quantizers/test_autoawq.py.

autoawq needs a separate environment, in which glowq is not installed. So this script runs twice:

    python -m support.autoawq_writer prepare SOURCE           in the environment of the tests: the model, and text
    python -m support.autoawq_writer quantize SOURCE TARGET   in the environment of autoawq: two checkpoints

TARGET/as-on-gpu is the checkpoint that autoawq writes if its search runs on a GPU. TARGET/damaged-by-cpu is the one
that it writes without a GPU. There its search saves the original weights with `.cpu()`, which makes no copy of a CPU
tensor, and then multiplies the weights in place. So the columns of each linear layer with folded scales also keep the
scales of the first trial, which no other layer divides out, and the checkpoint is not equivalent to the source model.
(https://github.com/mit-han-lab/llm-awq/issues/28 is about the same lines of code.)
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
    """Write two blocks of the bundled model, and the text on which the tests calibrate the other libraries."""
    from support import writers
    from support.bases import small_model

    shutil.copytree(small_model(), source, dirs_exist_ok=True)
    (source / TEXTS).write_text(json.dumps(writers.TEXTS))


def quantize(source: Path, target: Path) -> None:
    """Quantize as in autoawq's readme: 4 bits in groups of 64, scales searched and folded, weights clipped."""
    from awq.quantize.quantizer import AwqQuantizer

    class CopyingQuantizer(AwqQuantizer):
        """The quantizer of autoawq with a search that saves copies of the weights, as on a GPU."""

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
    # The texts are given, because the default is a dataset on the Hub. autoawq skips texts of more than 512 tokens.
    settings = {"calib_data": json.loads((source / TEXTS).read_text()), "max_calib_samples": SAMPLES}
    model.quantize(tokenizer, quant_config=CONFIG, quantizer_cls=quantizer, **settings)
    model.save_quantized(str(target))
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    {"prepare": prepare, "quantize": quantize}[sys.argv[1]](*map(Path, sys.argv[2:]))
