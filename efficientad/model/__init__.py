"""What a detector is: networks, numbers, calibration, agreement.

Never: threads, CUDA graphs, file formats.
"""
