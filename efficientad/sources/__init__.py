"""Pictures that come by themselves, from a folder or a camera, into the service.

Needs the extra `efficientad[watch]`; the command is `efficientad watch`.
"""
