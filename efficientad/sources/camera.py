"""A camera, through OpenCV's VideoCapture: a frame every so often is judged."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np

from efficientad.service.core import Inspection, Served
from efficientad.service.decoder import Picture, from_pixels
from efficientad.service.limits import Share
from efficientad.sources.judging import judge, say
from efficientad.utils.checks import check_number

_RETRY = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)  # seconds before a lost camera is opened again


@dataclass
class Camera:
    """Judges frames of a camera, the newest one each time.

    Between two of them frames are taken and thrown away, so that none is old. A camera that is
    lost is opened again until it comes back; a video file ends.

    Args:
        address: number of a camera ("0"), address of a stream, or a video file.
        model: name under which the detector is served; None is the only one.
        every: seconds from one judged frame to the next; 0 judges each that comes.

    Raises:
        ValueError: every is negative or no number.
    """

    address: str
    model: str | None = None
    every: float = 1.0

    def __post_init__(self) -> None:
        check_number("every", self.every, 0)

    async def __call__(self, inspection: Inspection) -> None:
        """Judge frames until it is cancelled, or the file ends.

        Raises:
            ImportError: OpenCV is not installed. OSError: the camera cannot be opened at the start.
            ValueError: the detector reads values of another range than a camera's 8 bits.
        """
        served = inspection.model(self.model)
        if served.predictor.value_range is not None:
            low, high = served.predictor.value_range
            raise ValueError(
                f"{served.name} was trained on values of {low:g} to {high:g}, and a camera gives "
                "8 bits; train on frames of the camera"
            )
        capture = await asyncio.to_thread(self._open)
        if capture is None:
            raise OSError(f"the camera {self._shown} cannot be opened")
        say(self._shown, "is open")
        try:
            while capture is not None:
                await self._frames(inspection, served, capture)
                capture.release()
                capture = None if os.path.isfile(self.address) else await self._again()
        finally:
            if capture is not None:
                capture.release()
        say(self._shown, "has ended")

    async def _frames(self, inspection: Inspection, served: Served, capture: Any) -> None:
        """Judge frames until there are no more."""
        due = time.monotonic()
        while await asyncio.to_thread(capture.grab):
            if time.monotonic() < due:
                continue
            due = max(due + self.every, time.monotonic())
            found, pixels = await asyncio.to_thread(capture.retrieve)
            if not found:
                return
            frame = np.ascontiguousarray(pixels[..., ::-1])  # OpenCV's are BGR

            def make(share: Share, frame: np.ndarray = frame) -> Picture:
                return from_pixels(frame, inspection.limits, share)

            name = datetime.now().astimezone().isoformat(timespec="milliseconds")
            await judge(inspection, served, make, name)

    async def _again(self) -> Any:
        """The camera, once it can be opened again."""
        say(self._shown, "is lost; it is opened again when it comes back")
        tries = 0
        while True:
            await asyncio.sleep(_RETRY[min(tries, len(_RETRY) - 1)])
            tries += 1
            capture = await asyncio.to_thread(self._open)
            if capture is not None:
                say(self._shown, "is open again")
                return capture

    def _open(self) -> Any:
        try:
            import cv2
        except ImportError as error:
            raise ImportError("a camera needs OpenCV: pip install 'efficientad[camera]'") from error
        number = self.address.isdecimal() and not os.path.exists(self.address)
        capture = cv2.VideoCapture(int(self.address) if number else self.address)
        if not capture.isOpened():
            capture.release()
            return None
        capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
        return capture

    @property
    def _shown(self) -> str:
        """The address without what may be a password."""
        head, at, tail = self.address.rpartition("@")
        return f"camera {head.partition('://')[0]}://{tail}" if at and head else f"camera {tail}"
