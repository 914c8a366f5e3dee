"""Algorithm 1 of the paper: settings, pictures, losses, steps, `fit`.

Never: command-line words, printing.
"""
