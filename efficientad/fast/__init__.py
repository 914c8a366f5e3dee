"""The fast path: folded weights, backends, graphs, predictor, streams, tiles.

Never: reading model files.
"""
