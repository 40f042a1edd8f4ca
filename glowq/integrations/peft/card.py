"""The README.md of an exported adapter: what the adapter is, and the code that loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .base import Base

__all__ = ["adapter_card"]

_TEXT = """---
{{ card_data }}
---

# {{ title }}, corrected by glowq, as a LoRA adapter

Low-rank factors that give a quantized model accuracy back, for engines that load LoRA adapters. They are valid for
exactly the quantized weights that they were made for:

```python
{{ load_code }}
```

Then

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base, "this/repository")
```

PEFT computes an adapter in float32 and glowq in the model's dtype, so that answers differ by rounding. On processors
with AVX512-BF16, bitsandbytes runs 4-bit weights through another kernel where glowq is not imported: the base itself
then answers somewhat differently, with and without the adapter.

## Do not merge it into the quantized base

`merge_and_unload()` quantizes the sum of weight and correction once more. The correction is smaller than the steps
between quantized values: most of it is rounded away, and a new error takes its place. For one dense model export the
correction with `glowq export ... --to merged`.
"""


def adapter_card(base: Base, model: Any) -> str:
    """Text of README.md.

    Args:
        base: the base of the adapter.
        model: a model of the base's class and dtype.
    """
    is_local = Path(base.name).is_absolute()
    data = ModelCardData(
        base_model=None if is_local else base.name,
        base_model_relation=None if is_local else "adapter",
        library_name="peft",
        tags=["glowq", "lora", "quantized", "low-rank-correction"],
    )
    text = _TEXT.replace("{{ title }}", Path(base.name).name).replace("{{ load_code }}", base.load_code(model))
    return str(ModelCard(text.replace("{{ card_data }}", data.to_yaml())).content)
