"""What is said of an image: prediction, plain path, overlay, report, folder.

Never: kernels, CUDA graphs.
"""
