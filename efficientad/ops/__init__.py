"""Fused operations, frame path and CPU convolutions: torch, Triton or csrc underneath.

Never: a detector.
"""
