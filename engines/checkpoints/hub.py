"""The local folder of a checkpoint: shipped, given, or downloaded from the hub."""

from pathlib import Path

from engines.checkpoints.home import expanded
from engines.checkpoints.variants import needed
from engines.errors import CheckpointError

SHORT_NAMES = {
    "sprint-0.6b": "Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers",
    "sprint-1.6b": "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers",
}

LIST_S = 10.0  # for the hub to say what a repository holds
_ENGINES = Path(__file__).resolve().parents[1]
# Where the shipped checkpoint lies: in the source tree, or in engines/ of an installed package.
_TINY = (_ENGINES.parent / "models" / "tiny", _ENGINES / "tiny")


def find_folder(name: str, part: str | None = None, variant: str | None = None) -> Path:
    """The local folder of a checkpoint, downloaded with a progress bar where `name` is a hub id; of such, no more than
    is read: with `part` (vae, controlnet) that one alone, and one variant of the weights."""
    if name == "tiny":
        for folder in _TINY:
            if folder.is_dir():
                return folder
        raise CheckpointError(f"tiny: the shipped checkpoint is in none of {', '.join(map(str, _TINY))}")
    folder = expanded(Path(name), CheckpointError, "give the folder's whole path, or set HOME")
    if folder.is_dir():
        return folder
    hub_id, _, revision = SHORT_NAMES.get(name, name).partition("@")
    if folder.exists() or hub_id.count("/") != 1 or name.startswith((".", "/", "~")):
        known = ", ".join(["tiny", *SHORT_NAMES])
        raise CheckpointError(f"model: {name!r} is no folder; give a folder, a hub id org/name[@revision], or {known}")
    return _download(hub_id, revision or None, part, variant)


def _download(hub_id: str, revision: str | None, part: str | None, variant: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors"]
    try:
        found = HfApi().model_info(hub_id, revision=revision, timeout=LIST_S)
    except Exception:  # of whatever client it uses: what was kept serves, or else the next call says what is wrong
        found = None
    if found is not None:
        patterns = needed([file.rfilename for file in found.siblings or ()], part, variant, hub_id)
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except RuntimeError as error:  # pathlib's, of a user without a home
        raise CheckpointError(
            f"model: {hub_id} has no place to be kept: this user has no home directory; set HF_HOME (or HOME) to a "
            "folder that can be written"
        ) from error
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        kept = _kept(hub_id, revision) if found is None else None
        if kept is not None:
            return kept
        reason = str(error).strip().splitlines()[0]
        shown = f" at revision {revision}" if revision else ""
        raise CheckpointError(
            f"model: {hub_id}{shown} is no local folder and cannot be had from the hub: {reason}"
        ) from error


def _kept(hub_id: str, revision: str | None) -> Path | None:
    """What was downloaded before, be it a part of the repository: the reader says whether that is enough."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    least = ["model_index.json", "config.json"]
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=least, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError):
        return None
