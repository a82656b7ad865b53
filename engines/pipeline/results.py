"""The results of a batch, delivered one by one as their downloads end."""

from collections.abc import Sequence

from engines.device.timer import Stopwatch
from engines.errors import OutputError
from engines.pipeline.download import Download
from engines.pipeline.text_stage import TextEmbedding
from engines.types import Deliver, Job, RawImage, StageSeconds


class BatchResults:
    """`images`: those collected so far, in the order of the jobs."""

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

    def collect(self, download: Download, deliver: Deliver | None) -> None:
        """Waits for the next image and delivers it. Raises OutputError if it is not finite."""
        index = len(self.images)
        result, embedding = download.wait(), self._embeddings[index]
        if not result.finite:
            raise OutputError(
                f"the decoder gave NaN or infinity for seed {self._jobs[index].seed} of a batch of {len(self._jobs)}"
            )
        text, denoise, *decode = self._watch.laps(index + 3)
        stages = StageSeconds(text, denoise, decode[index])
        image = RawImage(
            *(result.pixels, stages, self._bucket, embedding.truncated, embedding.cached),
            *(self._uncaptured, result.file),
        )
        self.images.append(image)
        if deliver is not None:
            deliver(index, image)
