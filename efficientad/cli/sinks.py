"""The options of `efficientad serve` that send verdicts on."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from efficientad.cli.common import UsageError, require_packages

if TYPE_CHECKING:
    from efficientad.sinks.delivery import Delivery

WEBHOOK_SECRET = "EFFICIENTAD_WEBHOOK_SECRET"  # environment variables
MQTT_PASSWORD = "EFFICIENTAD_MQTT_PASSWORD"
VERDICTS = ("all", "anomalous")


def add_sinks(command: argparse.ArgumentParser) -> None:
    """Add the options, which `sinks_of` reads."""
    for option, text, secret, variable in (
        ("webhook", "POST every verdict there, once it is stored", "secret", WEBHOOK_SECRET),
        ("mqtt", "publish every verdict at mqtt://HOST/TOPIC", "password", MQTT_PASSWORD),
    ):
        command.add_argument(f"--{option}", metavar="URL", help=text)
        command.add_argument(
            f"--{option}-verdicts", choices=VERDICTS, help="which are sent (default all)"
        )
        command.add_argument(
            f"--{option}-{secret}-file",
            type=Path,
            metavar="FILE",
            help=f"with its {secret}, which can also be in the environment variable {variable}",
        )


def sinks_of(options: argparse.Namespace) -> list[Delivery]:
    """The sinks that the options name. UsageError, ValueError, OSError: a wrong one."""
    sinks = []
    for option, secret in (("webhook", "secret"), ("mqtt", "password")):
        more = [f"{option}_verdicts", f"{option}_{secret}_file"]
        if getattr(options, option) is not None:
            sinks.append(_sink(option, *(getattr(options, name) for name in [option, *more])))
        elif any(getattr(options, name) is not None for name in more):
            words = " and ".join("--" + name.replace("_", "-") for name in more)
            raise UsageError(f"{words} go with --{option} URL")
    return sinks


def _sink(option: str, url: str, verdicts: str | None, file: Path | None) -> Delivery:
    require_packages(option, ["httpx" if option == "webhook" else "paho.mqtt.client"])
    from efficientad.sinks.delivery import Delivery, Receiver
    from efficientad.sinks.mqtt import Mqtt
    from efficientad.sinks.webhook import Webhook

    if option == "webhook":
        secret = _secret(file, "--webhook-secret-file", WEBHOOK_SECRET)
        receiver: Receiver = Webhook(url, secret)
    else:
        receiver = Mqtt(url, _secret(file, "--mqtt-password-file", MQTT_PASSWORD))
    return Delivery(receiver, only_anomalous=verdicts == "anomalous")


def _secret(file: Path | None, option: str, variable: str) -> str | None:
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
