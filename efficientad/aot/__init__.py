"""Kernels compiled ahead of time: what a predictor launches, for a GPU that need not be here.

They are read and launched in `ops`; nothing here runs on a GPU.
"""
