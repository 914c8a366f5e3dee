"""The fused kernels of the fast path.

Installed as `efficientad.kernels`; knows nothing of `efficientad`.
"""
