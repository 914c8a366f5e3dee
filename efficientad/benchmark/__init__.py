"""Times beside accuracy, on a user's machine.

Never: peers (bench/ has them).
"""
