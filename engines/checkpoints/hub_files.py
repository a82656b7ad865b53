"""Files of a hub's repository in the hub's cache on this machine: which are there, and how the others come there.

huggingface_hub names and links them; engines.checkpoints.hub_download brings the bytes. Why:
docs/understand/decisions/0012-downloads.md.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engines.checkpoints.hub_download import Download
from engines.errors import CheckpointError


@dataclass(frozen=True)
class HubFile:
    """A file of a repository at one commit. `checksum`: SHA-256 in hex of what Git LFS holds, Git's SHA-1 of others."""

    name: str
    size: int
    checksum: str

    def matches(self, path: Path) -> bool:
        """Reads the content at `path` and compares its checksum."""
        with path.open("rb") as file:
            if len(self.checksum) == 64:
                return hashlib.file_digest(file, "sha256").hexdigest() == self.checksum
            return hashlib.sha1(b"blob %d\0" % path.stat().st_size + file.read()).hexdigest() == self.checksum

    def whole(self, path: Path) -> bool:
        """Compares the size alone: nothing comes to its place before it was compared in full."""
        return path.is_file() and path.stat().st_size == self.size


def cache_folder(hub_id: str) -> Path:
    """The folder of a repository in the hub's cache. Raises RuntimeError where a user without a home has none."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser() / f"models--{hub_id.replace('/', '--')}"


def missing_files(folder: Path, files: Sequence[HubFile]) -> list[HubFile]:
    """Those that are not whole in the folder of a commit."""
    return [file for file in files if not file.whole(folder / file.name)]


def download_missing(hub_id: str, commit: str, files: Sequence[HubFile]) -> Path:
    """The folder of a commit with these files in it; downloads what is absent, and writes nothing where nothing is.

    Raises CheckpointError, OSError of the disk, and what huggingface_hub raises.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # exported, without saying so

    cache = cache_folder(hub_id)
    folder = cache / "snapshots" / commit
    if not missing_files(folder, files):
        return folder
    blobs, locks = cache / "blobs", cache.parent / ".locks" / cache.name
    for place in (blobs, locks):
        place.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(locks / "sana-sprint.lock"):  # processes with one cache download once
        here = missing_files(folder, files)
        Download(hub_id, commit, blobs, [file for file in here if not file.whole(blobs / file.checksum)]).run()
        for file in here:
            (folder / file.name).unlink(missing_ok=True)  # of another size
        snapshot_download(hub_id, revision=commit, allow_patterns=[file.name for file in files])
        for file in here:
            path = folder / file.name
            # A mirror that has other checksums than its list of files made the library download by itself.
            if path.resolve().name != file.checksum and not file.matches(path):
                path.unlink()
                raise CheckpointError(f"model: {hub_id}: {file.name} has another checksum than the hub's list names")
    return folder


def save_revision(hub_id: str, revision: str, commit: str) -> None:
    """Notes which commit a branch or tag stands for, as the hub's cache does, for starts without the hub."""
    reference = cache_folder(hub_id) / "refs" / revision
    if revision == commit or (reference.is_file() and reference.read_text() == commit):
        return
    reference.parent.mkdir(parents=True, exist_ok=True)
    draft = reference.with_name(f"{reference.name}.{commit}")
    draft.write_text(commit)
    draft.replace(reference)


def saved_snapshot(hub_id: str, revision: str) -> Path | None:
    """The folder of the commit that was downloaded last under this name, complete or not."""
    cache = cache_folder(hub_id)
    reference = cache / "refs" / revision
    folder = cache / "snapshots" / (reference.read_text().strip() if reference.is_file() else revision)
    return folder if folder.is_dir() else None
