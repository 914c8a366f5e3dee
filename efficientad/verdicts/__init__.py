"""Verdicts kept: their database, the picture files beside it, and what is asked of them.

Never: HTTP, or how a verdict came about.
"""
