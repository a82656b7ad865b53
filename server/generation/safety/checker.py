"""The checkers' protocol. Another package needs only this module to offer a checker under an entry point."""

from dataclasses import dataclass
from typing import Protocol

from engines.types import Pixels


@dataclass(frozen=True, slots=True)
class Verdict:
    """The client of a refused request gets `reason`: keep it short, and without the prompt."""

    allowed: bool
    reason: str = ""


class PromptChecker(Protocol):
    """Several codec threads call it at once. An exception refuses the request with 503."""

    def check(self, prompt: str) -> Verdict: ...


class ImageChecker(Protocol):
    """As PromptChecker. `pixels` is the image that the client is about to get: [height, width, 3] uint8 RGB."""

    def check(self, pixels: Pixels) -> Verdict: ...
