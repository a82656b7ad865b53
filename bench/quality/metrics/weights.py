"""Weights of the networks that judge: their published names, where they lie, and what they are."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.harness.errors import BenchError


class UnavailableError(BenchError):
    """A metric cannot be taken here: which package or file is missing, and where it comes from."""


@dataclass(frozen=True, slots=True)
class Published:
    """A file as its authors publish it: below a hub repository, or at a URL where `hub` is None."""

    file: str
    hub: str | None = None
    url: str | None = None
    sha256: str | None = None  # or its beginning, where the authors publish one


@dataclass(frozen=True, slots=True)
class Found:
    """A file of weights that is here."""

    path: Path
    sha256: str
    published: bool | None  # None where the authors publish no checksum

    def to_dict(self) -> dict[str, object]:
        return {"file": self.path.name, "sha256": self.sha256, "published": self.published}


@dataclass(frozen=True, slots=True)
class WeightPlaces:
    """Where to look: a folder (its files, or <hub repository's name>/<file>), else the caches of torch and the hub.

    download: whether what is absent is fetched.
    """

    folder: Path | None = None
    download: bool = False

    def find(self, metric: str, wanted: Published) -> Found:
        """Raises UnavailableError where it is absent."""
        path = (
            self._in_folder(wanted) if self.folder else (self._of_hub(wanted) if wanted.hub else self._of_url(wanted))
        )
        if path is None:
            place = f"in {self.folder}" if self.folder else "in the cache"
            source = f"https://huggingface.co/{wanted.hub}" if wanted.hub else wanted.url
            raise UnavailableError(
                f"{metric}: {wanted.file} is not {place}; it comes from {source} (--download fetches it)"
            )
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        known = wanted.sha256
        return Found(path, sha256, None if known is None else sha256.startswith(known))

    def _in_folder(self, wanted: Published) -> Path | None:
        assert self.folder is not None
        places = [self.folder / wanted.file]
        if wanted.hub:
            places.insert(0, self.folder / wanted.hub.partition("/")[2] / wanted.file)
        return next((place for place in places if place.is_file()), None)

    def _of_url(self, wanted: Published) -> Path | None:
        path = Path(torch.hub.get_dir()) / "checkpoints" / wanted.file
        if not path.is_file() and self.download and wanted.url:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(wanted.url, str(path), hash_prefix=wanted.sha256)
            except (OSError, RuntimeError) as error:
                raise UnavailableError(f"{wanted.file}: cannot be fetched from {wanted.url}: {error}") from error
        return path if path.is_file() else None

    def _of_hub(self, wanted: Published) -> Path | None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        assert wanted.hub is not None
        try:
            return Path(hf_hub_download(wanted.hub, wanted.file, local_files_only=not self.download))
        except LocalEntryNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UnavailableError(f"{wanted.hub}: cannot be fetched from the hub: {error}") from error
