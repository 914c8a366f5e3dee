"""Tools that know nothing of anomaly detection.

Never: a network, an image format, an import of another room.
"""
