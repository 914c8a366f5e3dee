"""Algorithm 3 of the paper: a teacher from a backbone and photos.

Never: detectors.
"""
