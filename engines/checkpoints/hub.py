"""Finds the local folder of a checkpoint, or downloads it from the hub."""

import logging
from pathlib import Path

from engines.checkpoints.home import expand_home
from engines.checkpoints.hub_download import HubFile
from engines.checkpoints.hub_files import cache_folder, download_missing, save_revision, saved_snapshot
from engines.checkpoints.variants import required_files
from engines.errors import CheckpointError

SHORT_NAMES = {
    "sprint-0.6b": "Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers",
    "sprint-1.6b": "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers",
}

LIST_TIMEOUT_S = 10.0  # of the hub's list of files
logger = logging.getLogger("engines.checkpoints")
_ENGINES = Path(__file__).resolve().parents[1]
# The shipped checkpoint in the source tree, and in an installed package.
_TINY = (_ENGINES.parent / "models" / "tiny", _ENGINES / "tiny")


def find_folder(name: str, part: str | None = None, variant: str | None = None) -> Path:
    """Returns the local folder of a checkpoint; downloads a hub id with progress in the log.

    Downloads one variant of the weights alone; with `part` (vae, controlnet) only that component. Raises
    CheckpointError.
    """
    if name == "tiny":
        for folder in _TINY:
            if folder.is_dir():
                return folder
        raise CheckpointError(f"tiny: the shipped checkpoint is in none of {', '.join(map(str, _TINY))}")
    folder = expand_home(Path(name), CheckpointError, "give the folder's whole path, or set HOME")
    if folder.is_dir():
        return folder
    hub_id, _, revision = SHORT_NAMES.get(name, name).partition("@")
    if folder.exists() or hub_id.count("/") != 1 or name.startswith((".", "/", "~")):
        known = ", ".join(["tiny", *SHORT_NAMES])
        raise CheckpointError(f"model: {name!r} is no folder; give a folder, a hub id org/name[@revision], or {known}")
    return _download(hub_id, revision or "main", part, variant)


def _download(hub_id: str, revision: str, part: str | None, variant: str | None) -> Path:
    """Downloads the hub's commit of a revision; falls back to the cache if hub or cache fails."""
    try:
        cache_folder(hub_id)
    except RuntimeError as error:  # of pathlib, for a user without a home
        raise CheckpointError(
            f"model: {hub_id} has no place to be kept: this user has no home directory; set HF_HOME (or HOME) to a "
            "folder that can be written"
        ) from error
    try:
        commit, files = _listing(hub_id, revision)
        names = required_files([file.name for file in files], part, variant, hub_id)
        folder = download_missing(hub_id, commit, [file for file in files if file.name in names])
    except CheckpointError:
        raise
    except Exception as error:  # of any HTTP client of huggingface_hub
        reason = _reason(hub_id, revision, error)
        cached = _cached(hub_id, revision, part, variant, reason)
        if cached is None:
            raise CheckpointError(
                f"model: {hub_id} is no local folder and cannot be had from the hub: {reason}"
            ) from error
        logger.warning("%s: %s; what was downloaded before is served: %s", hub_id, reason, cached)
        return cached
    try:
        save_revision(hub_id, revision, commit)
    except OSError as error:  # a read-only cache
        logger.info("%s: the cache cannot be written (%s), and holds all that is needed", hub_id, error.strerror)
    return folder


def _listing(hub_id: str, revision: str) -> tuple[str, list[HubFile]]:
    """Returns the current commit of a revision, and its files."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi()
    commit = api.model_info(hub_id, revision=revision, timeout=LIST_TIMEOUT_S).sha or revision
    tree = api.list_repo_tree(hub_id, recursive=True, revision=commit)
    entries = [entry for entry in tree if isinstance(entry, RepoFile)]
    return commit, [
        HubFile(entry.path, entry.size, entry.blob_id if entry.lfs is None else entry.lfs.sha256) for entry in entries
    ]


def _cached(hub_id: str, revision: str, part: str | None, variant: str | None, reason: str) -> Path | None:
    """Returns the folder of an earlier download. Raises CheckpointError for a missing file."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    folder = saved_snapshot(hub_id, revision)
    if folder is None:
        return None
    try:
        names = [entry.path for entry in get_cached_repo_tree(hub_id, revision=folder.name)]
    except CachedRepoTreeNotFoundError:  # filled by another program; the reader reports missing files
        return folder
    missing = [name for name in required_files(names, part, variant, hub_id) if not (folder / name).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"model: {hub_id}: {folder / missing[0]}{more} was never downloaded, and cannot be now: {reason}"
        )
    return folder


def _reason(hub_id: str, revision: str, error: Exception) -> str:
    """Returns cause and remedy in one line."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RevisionNotFoundError

    hub = constants.ENDPOINT
    key = "HF_TOKEN is" if get_token() else "no HF_TOKEN is"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it, or give a folder"
    if isinstance(error, RevisionNotFoundError):
        return f"{hub} has no revision {revision} of it"
    if isinstance(error, GatedRepoError):
        return f"its owner wants terms accepted, at {hub}/{hub_id}, and then HF_TOKEN of that account; {key} set"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        response = f"{hub} answers {status} to {error.response.url.path}"
        if status in (401, 403, 404):
            return f"{response}: there is no such repository or file, or HF_TOKEN may not read it; {key} set"
        return response
    if isinstance(error, OSError) and error.errno is not None:
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{where}; make room, or set HF_HOME to a folder that can be written"
    message = str(error).strip().partition("\n")[0]
    cause = f"{type(error).__name__}{message and ': '}{message}"
    return f"{hub} cannot be asked ({cause}); look at HF_ENDPOINT and the network"
