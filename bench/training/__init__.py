"""What a training reaches on a data set, and how fast its steps are.

Never: a figure without its recipe.
"""
