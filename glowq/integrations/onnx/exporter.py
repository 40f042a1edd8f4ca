"""Export a corrected model as an ONNX graph for ONNX Runtime and onnxruntime-genai.

Quantized layers become ONNX Runtime's own operators for quantized weights, and the right product of each group is one
node of the graph. Everything else is float32.
"""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

from ...errors import ConfigError, ExportError
from ...models.forward import example_inputs
from ...models.preprocessors import load_tokenizer
from ...runtime.attach import attached, hold_as_floats
from ...runtime.switching import set_enabled
from ...utils.versions import warn_untested
from ..export.common import difference, first_output, load_corrected, refuse_experts, stored_correction
from .check import check, operator_counts
from .genai import write_genai_config
from .graph import describe, export_graph
from .operators import use_operators

__all__ = ["USE", "WHAT", "write"]

WHAT = "an ONNX graph"
USE = """`model.onnx` and its weights run in ONNX Runtime on the CPU; `glowq_export.json` names the inputs and outputs:

```python
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
print([(value.name, value.shape) for value in session.get_inputs()])
```

A decoder has a `genai_config.json` too:

```python
import onnxruntime_genai as genai

model = genai.Model(".")
tokenizer, parameters = genai.Tokenizer(model), genai.GeneratorParams(model)
parameters.set_search_options(max_length=64, do_sample=False)
generator = genai.Generator(model, parameters)
generator.append_tokens(tokenizer.encode("def read(path):"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
```"""
_TESTED = {
    "onnx": ">=1.23,<1.24",
    "onnxruntime": ">=1.25,<1.32",
    "onnxscript": ">=0.7,<0.8",
    "torch": ">=2.13,<2.14",
}


def write(source: str, folder: Path) -> dict[str, Any]:
    """Write model.onnx, model.onnx.data, config.json and the tokenizer, and for a decoder genai_config.json.

    Args:
        source: folder or Hub name of a corrected text decoder or text encoder, in either saved form.
        folder: an empty folder to write to.

    Returns:
        "inputs" and "outputs" (names, without those of the cache), "operators" (name -> number of nodes), "genai"
        (whether genai_config.json was written), "kernel_difference" (difference between the outputs in float32 and the
        outputs that the base's library computes in its own dtype, as a share of the outputs), and "check", see
        `glowq.integrations.onnx.check.check`.

    Raises:
        ConfigError: a package that the export needs is not installed.
        ExportError: the model carries no correction; ONNX Runtime has no operator for a module's packing; torch cannot
            export the architecture; or ONNX Runtime computes other outputs than the model.
    """
    _check_packages()
    correction = stored_correction(source)
    if not correction.groups:
        raise ExportError(f"the correction of {source} restores no group: there is nothing to export.")
    tokenizer = load_tokenizer(source, (correction.base_model or {}).get("name"))
    model = load_corrected(source)
    refuse_experts(model, "which experts a token goes to is not known before the graph runs")
    hold_as_floats(model)
    interface = describe(model, tokenizer)
    silent = [group for group, container in attached(model).items() if not bool(container.right.factor.any())]
    set_enabled(model, False, groups=silent)  # their nodes would only add zero
    inputs = example_inputs(model)
    as_is = first_output(model, inputs)
    use_operators(model)
    rounding = difference(first_output(model, {name: value.cpu() for name, value in inputs.items()}), as_is)
    export_graph(model, interface, folder)
    figures = check(folder, model, interface)
    config = copy.deepcopy(model.config)
    del config.quantization_config  # a program that loads this folder must not quantize anything
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {
        "inputs": list(interface.inputs),
        "outputs": list(interface.outputs),
        "operators": operator_counts(folder),
        "genai": write_genai_config(folder, model, interface),
        "kernel_difference": rounding["relative_difference"],
        "check": figures,
    }


def _check_packages() -> None:
    for package, tested in _TESTED.items():
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"--to onnx needs {package}, which is not installed: pip install 'glowq[onnx]'")
        warn_untested(package, tested, "what the export writes is checked all the same")
