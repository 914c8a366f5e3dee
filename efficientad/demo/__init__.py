"""Drawn parts, and the walk from nothing to a report.

Never: imported by anything but cli and bench.
"""
