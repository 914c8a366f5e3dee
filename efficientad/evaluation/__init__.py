"""Metrics, and `evaluate`, a detector's figures on a test set.

Never: drawing (results does), the fast path.
"""
