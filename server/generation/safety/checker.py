"""What a checker is. Another package brings one of its own under an entry point, and needs nothing but this."""

from dataclasses import dataclass
from typing import Protocol

from engines.types import Pixels


@dataclass(frozen=True, slots=True)
class Verdict:
    """`reason` is told to the client of a request that is refused: short, and without the prompt."""

    allowed: bool
    reason: str = ""


class PromptChecker(Protocol):
    """Called on a codec thread, by several threads at once. An exception refuses the request with 503."""

    def check(self, prompt: str) -> Verdict: ...


class ImageChecker(Protocol):
    """As PromptChecker. The pixels are what the client is about to get: [height, width, 3] uint8 RGB."""

    def check(self, pixels: Pixels) -> Verdict: ...
