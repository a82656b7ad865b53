"""The local folder of a checkpoint: shipped, given, or downloaded from the hub."""

from pathlib import Path

from engines.errors import CheckpointError

SHORT_NAMES = {
    "sprint-0.6b": "Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers",
    "sprint-1.6b": "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers",
}

_ENGINES = Path(__file__).resolve().parents[1]
# Where the shipped checkpoint lies: in the source tree, or in engines/ of an installed package.
_TINY = (_ENGINES.parent / "models" / "tiny", _ENGINES / "tiny")


def find_folder(name: str) -> Path:
    """The local folder of a checkpoint, downloaded with a progress bar where `name` is a hub id."""
    if name == "tiny":
        for folder in _TINY:
            if folder.is_dir():
                return folder
        raise CheckpointError(f"tiny: the shipped checkpoint is in none of {', '.join(map(str, _TINY))}")
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    hub_id, _, revision = SHORT_NAMES.get(name, name).partition("@")
    if folder.exists() or hub_id.count("/") != 1 or name.startswith((".", "/", "~")):
        known = ", ".join(["tiny", *SHORT_NAMES])
        raise CheckpointError(f"model: {name!r} is no folder; give a folder, a hub id org/name[@revision], or {known}")
    return _download(hub_id, revision or None)


def _download(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        at = f" at revision {revision}" if revision else ""
        raise CheckpointError(
            f"model: {hub_id}{at} is no local folder and cannot be had from the hub: {reason}"
        ) from error
