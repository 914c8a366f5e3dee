"""The predictor beside its peers, its frame path, and a soak.

Never: a figure without its error.
"""
