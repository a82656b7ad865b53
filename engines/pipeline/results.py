"""The images of a batch, handed out one by one as they come from the device."""

from collections.abc import Sequence

from engines.device.timer import Stopwatch
from engines.errors import OutputError
from engines.pipeline.download import Download
from engines.pipeline.embedding_cache import TextEmbedding
from engines.types import Deliver, Job, RawImage, StageSeconds


class BatchResults:
    """The images of a batch, as they come."""

    def __init__(
        self,
        jobs: Sequence[Job],
        embeddings: Sequence[TextEmbedding],
        watch: Stopwatch,
        bucket: int,
        *,
        uncaptured: bool,
    ):
        self._jobs, self._embeddings, self._watch = jobs, embeddings, watch
        self._bucket, self._uncaptured = bucket, uncaptured
        self.images: list[RawImage] = []

    def take(self, download: Download, deliver: Deliver | None) -> None:
        """Waits for the next image and hands it out. Raises OutputError where it is not finite."""
        index = len(self.images)
        got, embedding = download.wait(), self._embeddings[index]
        if not got.finite:
            raise OutputError(
                f"the decoder gave NaN or infinity for seed {self._jobs[index].seed} of a batch of {len(self._jobs)}"
            )
        text, denoise, *decode = self._watch.laps(index + 3)
        stages = StageSeconds(text, denoise, decode[index])
        image = RawImage(
            got.pixels, stages, self._bucket, embedding.truncated, embedding.cached, self._uncaptured, got.file
        )
        self.images.append(image)
        if deliver is not None:
            deliver(index, image)
