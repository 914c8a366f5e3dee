"""An inspection service: pictures in, stored verdicts out, and a page to look at them.

Never: training, or an answer that is not stored.
"""
