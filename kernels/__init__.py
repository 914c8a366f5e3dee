"""Floor 0, imports triton only: the fused kernels of the fast path.

Installed as `efficientad.kernels`; knows nothing of `efficientad`.
"""
