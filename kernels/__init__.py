"""Floor 0, imports triton only: the fused kernels of the fast path; installed as `efficientad.kernels`."""
