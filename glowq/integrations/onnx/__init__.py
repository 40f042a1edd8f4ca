"""Export to ONNX Runtime: quantized operators, the graph, and the check of the written model.

This package may import the core packages, `integrations.transformers` and `integrations.export`. Only functions import
onnx.
"""
