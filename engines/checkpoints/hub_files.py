"""Files of a hub's repository in the local cache: finds present ones, downloads missing ones.

huggingface_hub names and links them; engines.checkpoints.hub_download downloads them. Reasons:
docs/understand/decisions/0012-downloads.md.
"""

from collections.abc import Sequence
from pathlib import Path

from engines.checkpoints.hub_download import Download, HubFile
from engines.errors import CheckpointError


def cache_folder(hub_id: str) -> Path:
    """Returns the folder of a repository in the hub's cache. Raises RuntimeError for a user without a home."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser() / f"models--{hub_id.replace('/', '--')}"


def missing_files(folder: Path, files: Sequence[HubFile]) -> list[HubFile]:
    """Returns the files that are missing or incomplete in the folder of a commit."""
    return [file for file in files if not file.has_full_size(folder / file.name)]


def download_missing(hub_id: str, commit: str, files: Sequence[HubFile]) -> Path:
    """Returns the folder of a commit with these files; downloads the missing ones, and writes nothing without any.

    Raises CheckpointError, OSError of the disk, and errors of huggingface_hub.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # exported without a declaration

    cache = cache_folder(hub_id)
    folder = cache / "snapshots" / commit
    if not missing_files(folder, files):
        return folder
    blobs, locks = cache / "blobs", cache.parent / ".locks" / cache.name
    for directory in (blobs, locks):
        directory.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(locks / "sana-sprint.lock"):  # processes with one cache download once
        missing = missing_files(folder, files)
        not_downloaded = [file for file in missing if not file.has_full_size(blobs / file.checksum)]
        Download(hub_id, commit, blobs, not_downloaded).run()
        for file in missing:
            (folder / file.name).unlink(missing_ok=True)  # of another size
        snapshot_download(hub_id, revision=commit, allow_patterns=[file.name for file in files])
        for file in missing:
            path = folder / file.name
            # If a mirror's checksums differ from its list of files, huggingface_hub downloads the file itself.
            if path.resolve().name != file.checksum and not file.matches(path):
                path.unlink()
                raise CheckpointError(f"model: {hub_id}: {file.name} has another checksum than the hub's list names")
    return folder


def save_revision(hub_id: str, revision: str, commit: str) -> None:
    """Stores the commit of a branch or tag in the hub's cache, for starts without the hub."""
    reference = cache_folder(hub_id) / "refs" / revision
    if revision == commit or (reference.is_file() and reference.read_text() == commit):
        return
    reference.parent.mkdir(parents=True, exist_ok=True)
    draft = reference.with_name(f"{reference.name}.{commit}")
    draft.write_text(commit)
    draft.replace(reference)


def saved_snapshot(hub_id: str, revision: str) -> Path | None:
    """Returns the folder of the commit last downloaded for a revision, complete or not."""
    cache = cache_folder(hub_id)
    reference = cache / "refs" / revision
    folder = cache / "snapshots" / (reference.read_text().strip() if reference.is_file() else revision)
    return folder if folder.is_dir() else None
