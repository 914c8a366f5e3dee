"""Single kernels: correctness first, then times, sweeps and ceilings.

Never: a time of what is wrong.
"""
