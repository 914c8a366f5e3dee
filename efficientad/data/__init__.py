"""Files to pixels, batches and data sets.

Never: a network, a metric, a file of ours.
"""
