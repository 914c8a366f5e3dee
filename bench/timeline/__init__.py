"""The launches of a replay on paper: an estimate of each one's time, and what waits for what.

Never: a measurement, or a list of launches that the predictor's own code did not make.
"""
