"""Variants of weights: chooses the files of one variant (plain, fp16, ...) by their names. Opens no file.

A *variant* is a word in file names, as save_pretrained(variant="fp16") of diffusers and transformers writes it:
model.fp16.safetensors, model.fp16-00001-of-00002.safetensors or model-00001-of-00002.fp16.safetensors with
model.safetensors.index.fp16.json. "" is the plain one.
"""

import re
from collections.abc import Iterable, Sequence

from engines.errors import CheckpointError

STEMS = ("diffusion_pytorch_model", "model")
_STEM = rf"(?:{'|'.join(STEMS)})"
_FILE = re.compile(rf"{_STEM}(?:\.(?P<a>[^.]+?))?(?P<shard>-\d+-of-\d+)?(?:\.(?P<b>[^.]+))?\.safetensors")
_INDEX = re.compile(rf"{_STEM}\.safetensors(?:\.(?P<a>[^.]+))?\.index(?:\.(?P<b>[^.]+))?\.json")
_FOLDERS = ("scheduler", "tokenizer", "transformer", "vae", "text_encoder", "controlnet")
_FILES = ("model_index.json", "sprint.json")


def variant_of(name: str) -> str | None:
    """Returns the variant of a file of weights or of an index; None for other names."""
    match = _FILE.fullmatch(name) or _INDEX.fullmatch(name)
    return None if match is None else match["a"] or match["b"] or ""


def choose_variant(names: Iterable[str], requested: str | None, where: str) -> str | None:
    """Returns the variant to read in one folder: the requested one, else the plain one, else the only one.

    None without weights. Raises CheckpointError, which begins with `where`, if several remain.
    """
    present = sorted({variant for name in names if (variant := variant_of(name)) is not None})
    if requested is not None and requested in present:
        return requested
    if "" in present or not present:
        return "" if present else None
    if len(present) > 1 or requested is not None:
        listed = ", ".join(present)
        need = "the plain ones or one of them is needed" if requested is None else f"--variant: got {requested}"
        raise CheckpointError(f"{where}: holds the variants {listed}; {need}; choose by --variant {present[0]}")
    return present[0]


def single_file(names: Iterable[str], variant: str) -> str | None:
    """Returns the name of the single file of weights of a variant; None without one."""
    allowed = {f"{stem}{variant and '.'}{variant}.safetensors" for stem in STEMS}
    return next((name for name in sorted(names) if name in allowed), None)


def index_file(names: Iterable[str], variant: str) -> str | None:
    """Returns the name of the index of a variant's files; None without one."""
    return next((name for name in sorted(names) if _INDEX.fullmatch(name) and variant_of(name) == variant), None)


def required_files(names: Sequence[str], part: str | None, requested: str | None, where: str) -> list[str]:
    """Returns the files of a repository that a load reads.

    With `part` (vae, controlnet), those of that component, in its folder or in the root of the repository. Raises
    CheckpointError.
    """
    if part is None:
        folders: Sequence[str] = _FOLDERS
        files = [name for name in names if name in _FILES]
    else:
        folders = [part] if any(name.startswith(f"{part}/") for name in names) else [""]
        files = []
    for folder in folders:
        prefix = f"{folder}/" if folder else ""
        inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        inside = [name for name in inside if "/" not in name]
        files += [prefix + name for name in _folder_files(inside, requested, f"{where}/{folder}".rstrip("/"))]
    return files


def _folder_files(names: Sequence[str], requested: str | None, where: str) -> list[str]:
    configs = [name for name in names if name.endswith(".json") and not _INDEX.fullmatch(name)]
    variant = choose_variant(names, requested, where)
    if variant is None:
        return configs
    single = single_file(names, variant)
    if single is not None:
        return [*configs, single]
    index = index_file(names, variant)
    shards = [name for name in names if _FILE.fullmatch(name) and variant_of(name) == variant]
    # The files of an index may have any name.
    shards = shards or [name for name in names if name.endswith(".safetensors") and not _FILE.fullmatch(name)]
    return [*configs, *([] if index is None else [index]), *shards]
