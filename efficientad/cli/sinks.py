"""The options of `efficientad serve` that send verdicts on."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from efficientad.cli.common import UsageError, require_packages

if TYPE_CHECKING:
    from efficientad.sinks.delivery import Delivery

WEBHOOK_SECRET = "EFFICIENTAD_WEBHOOK_SECRET"  # environment variable
VERDICTS = ("all", "anomalous")


def add_sinks(command: argparse.ArgumentParser) -> None:
    """Add the options, which `sinks_of` reads."""
    command.add_argument("--webhook", metavar="URL", help="POST every verdict there, once stored")
    command.add_argument(
        "--webhook-verdicts", choices=VERDICTS, help="which are sent (default all)"
    )
    command.add_argument(
        "--webhook-secret-file",
        type=Path,
        metavar="FILE",
        help=f"sign with the secret in it, or else in the environment variable {WEBHOOK_SECRET}",
    )


def sinks_of(options: argparse.Namespace) -> list[Delivery]:
    """The sinks that the options name. UsageError, ValueError, OSError: a wrong one."""
    sinks = []
    if options.webhook is not None:
        require_packages("webhook", ["httpx"])
        from efficientad.sinks.delivery import Delivery
        from efficientad.sinks.webhook import Webhook

        secret = secret_of(options.webhook_secret_file, "--webhook-secret-file", WEBHOOK_SECRET)
        only_anomalous = options.webhook_verdicts == "anomalous"
        webhook = Webhook(options.webhook, secret)
        sinks.append(Delivery(webhook, only_anomalous=only_anomalous))
    elif options.webhook_secret_file is not None or options.webhook_verdicts is not None:
        raise UsageError("--webhook-secret-file and --webhook-verdicts go with --webhook URL")
    return sinks


def secret_of(file: Path | None, option: str, variable: str) -> str | None:
    """A secret, from a file or the environment; None for none."""
    secret = os.environ.get(variable) or None
    if file is None:
        return secret
    if secret is not None:
        raise UsageError(f"{option} is given, and {variable} is set; leave one out")
    secret = file.read_text(encoding="utf-8").strip()
    if not secret:
        raise UsageError(f"{option} is {file}, which is empty")
    return secret
