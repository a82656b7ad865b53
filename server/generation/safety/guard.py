"""Checks of prompts and images, counted and timed. A checker that fails refuses the request too."""

import io
import logging
import time
from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
from PIL import Image

from engines.types import Pixels, RawImage
from server.errors import ContentPolicyError, RequestError, SafetyError
from server.generation.safety.checker import ImageChecker, PromptChecker, Verdict
from server.generation.safety.registry import image_checker, prompt_checker
from server.telemetry.metrics import Metrics

Encode = Callable[[RawImage], bytes]

logger = logging.getLogger("server.safety")


class Safety:
    """The checkers of this server, if any."""

    def __init__(self, options: Mapping[str, str], metrics: Metrics) -> None:
        """`options` is --safety: `prompt` and `image`, each with its checker. Raises SettingsError."""
        self._metrics = metrics
        self._prompt: PromptChecker | None = prompt_checker(options["prompt"]) if "prompt" in options else None
        self._image: ImageChecker | None = image_checker(options["image"]) if "image" in options else None

    @property
    def is_on(self) -> bool:
        return self._prompt is not None or self._image is not None

    @property
    def checks_prompts(self) -> bool:
        return self._prompt is not None

    def check_prompt(self, prompt: str) -> float:
        """Returns the seconds it took. Raises ContentPolicyError (422) or SafetyError (503)."""
        checker = self._prompt
        return 0.0 if checker is None else self._checked("prompt", lambda: checker.check(prompt))

    def checked_encoder(self, encode: Encode, seconds: list[float]) -> Encode:
        """Returns an encoder that checks each image first and appends the check's seconds. Raises as `check_prompt`."""
        checker = self._image
        if checker is None:
            return encode

        def checked(image: RawImage) -> bytes:
            seconds.append(self._checked("image", lambda: checker.check(shown_pixels(image))))
            return encode(image)

        return checked

    def _checked(self, what: Literal["prompt", "image"], check: Callable[[], object]) -> float:
        began = time.monotonic()
        refusal: RequestError | None = None
        try:
            verdict = check()
            if not isinstance(verdict, Verdict):
                raise TypeError(f"a checker returned {type(verdict).__name__}, needed is Verdict")
            label = "allowed" if verdict.allowed else "refused"
            if not verdict.allowed:
                refusal = ContentPolicyError(what, verdict.reason)
        except Exception as error:  # whatever another package raises; its text may repeat a prompt, so it is not logged
            logger.error("the checker of the %s failed: %s at %s", what, type(error).__name__, _location(error))
            label, refusal = "failed", SafetyError(what)
        seconds = time.monotonic() - began
        self._metrics.safety_checks.labels(what, label).inc()
        self._metrics.safety_seconds.labels(what).observe(seconds)
        if refusal is not None:
            raise refusal
        return seconds


def shown_pixels(image: RawImage) -> Pixels:
    """Returns the pixels that the client gets; decodes a file that the engine made."""
    if image.file is None:
        return image.pixels
    with Image.open(io.BytesIO(image.file), formats=("JPEG", "PNG")) as file:
        return np.asarray(file.convert("RGB"), dtype=np.uint8)


def _location(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "?" if trace is None else f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
