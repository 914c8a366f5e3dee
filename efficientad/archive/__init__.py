"""Folders and tables of more pictures than one process should score, on Ray Data.

Needs the extra `efficientad[archive]`; the command is `efficientad archive`. Never: a verdict that
`predict` would not give, or a row twice.
"""
