"""Runs engines of the ``onnxruntime`` target on a provider of ONNX Runtime."""
