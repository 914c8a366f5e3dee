"""The fast path inside anomalib's and nelson1425's programs.

Never: an import of either project.
"""
