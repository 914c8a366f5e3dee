"""Stored verdicts, sent on: to a webhook or an MQTT broker, each at least once and in order.

Needs the extra `efficientad[webhook]` or `efficientad[mqtt]`; the command is `efficientad serve`.
"""
