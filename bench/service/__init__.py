"""The inspection service under load, and killed.

Never: a figure of a run that lost a verdict.
"""
