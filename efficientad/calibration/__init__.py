"""A detector's numbers from good images, and what a low precision does to its scores.

Never: files of models, words of a command line.
"""
