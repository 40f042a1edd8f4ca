"""Kernels that compute a quantized module's product together with its correction, see `Backend.fused_product`."""

from __future__ import annotations
