"""A model as a file: ours, others', teachers, ONNX. The only room that opens model files.

Never: training.
"""
