"""Benchmarks of the GPU kernels; run ``python benchmarks/gpu/ops.py --device cuda`` (see README.md)."""
