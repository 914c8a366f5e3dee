"""Everything for a machine with a GPU, in one resumable command.

Never: a measurement of its own.
"""
