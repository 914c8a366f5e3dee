"""Every kernel compiled for every architecture, without a GPU.

Never: an import of torch.
"""
