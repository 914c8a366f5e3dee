"""Words to calls and back.

Never: arithmetic; nothing imports it, and its --help imports no torch.
"""
