"""Weights of the metrics' networks: published names, local files, checksums."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.harness.errors import BenchError


class UnavailableError(BenchError):
    """A metric is unavailable: the message names the missing package or file and its source."""


@dataclass(frozen=True, slots=True)
class Published:
    """A published file: of a hub repository, or at a URL if `hub` is None."""

    file: str
    hub: str | None = None
    url: str | None = None
    sha256: str | None = None  # or its beginning, where the authors publish one


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A local file of weights."""

    path: Path
    sha256: str
    published: bool | None  # None where the authors publish no checksum

    def to_dict(self) -> dict[str, object]:
        return {"file": self.path.name, "sha256": self.sha256, "published": self.published}


@dataclass(frozen=True, slots=True)
class WeightLocations:
    """Search places: a folder (its files, or <hub repository's name>/<file>), else the caches of torch and the hub.

    download: fetches missing files.
    """

    folder: Path | None = None
    download: bool = False

    def find(self, metric: str, published: Published) -> WeightFile:
        """Returns the local file. Raises UnavailableError if it is missing."""
        path = (
            self._in_folder(published)
            if self.folder
            else (self._from_hub(published) if published.hub else self._from_url(published))
        )
        if path is None:
            location = f"in {self.folder}" if self.folder else "in the cache"
            source = f"https://huggingface.co/{published.hub}" if published.hub else published.url
            raise UnavailableError(
                f"{metric}: {published.file} is not {location}; it comes from {source} (--download fetches it)"
            )
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        checksum = published.sha256
        return WeightFile(path, sha256, None if checksum is None else sha256.startswith(checksum))

    def _in_folder(self, published: Published) -> Path | None:
        assert self.folder is not None
        locations = [self.folder / published.file]
        if published.hub:
            locations.insert(0, self.folder / published.hub.partition("/")[2] / published.file)
        return next((location for location in locations if location.is_file()), None)

    def _from_url(self, published: Published) -> Path | None:
        path = Path(torch.hub.get_dir()) / "checkpoints" / published.file
        if not path.is_file() and self.download and published.url:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(published.url, str(path), hash_prefix=published.sha256)
            except (OSError, RuntimeError) as error:
                raise UnavailableError(f"{published.file}: cannot be fetched from {published.url}: {error}") from error
        return path if path.is_file() else None

    def _from_hub(self, published: Published) -> Path | None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        assert published.hub is not None
        try:
            return Path(hf_hub_download(published.hub, published.file, local_files_only=not self.download))
        except LocalEntryNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UnavailableError(f"{published.hub}: cannot be fetched from the hub: {error}") from error
