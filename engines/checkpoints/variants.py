"""Which files of a checkpoint are its weights, where it holds them more than once: plain, fp16, ...

A *variant* is a word in the names of files, as save_pretrained(variant="fp16") of diffusers and transformers writes it:
model.fp16.safetensors, model.fp16-00001-of-00002.safetensors or model-00001-of-00002.fp16.safetensors with
model.safetensors.index.fp16.json. "" is the plain one. Knows names, opens no file.
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
    """The variant that a file of weights, or an index of such, belongs to; None for other names."""
    found = _FILE.fullmatch(name) or _INDEX.fullmatch(name)
    return None if found is None else found["a"] or found["b"] or ""


def choose_variant(names: Iterable[str], asked: str | None, where: str) -> str | None:
    """The variant to read of those in one folder: the one that is asked for, else the plain one, else the only one.

    None where there are no weights. Raises CheckpointError, which begins with `where`, where several are left.
    """
    present = sorted({variant for name in names if (variant := variant_of(name)) is not None})
    if asked is not None and asked in present:
        return asked
    if "" in present or not present:
        return "" if present else None
    if len(present) > 1 or asked is not None:
        listed = ", ".join(present)
        wanted = "the plain ones or one of them is needed" if asked is None else f"--variant: got {asked}"
        raise CheckpointError(f"{where}: holds the variants {listed}; {wanted}; choose by --variant {present[0]}")
    return present[0]


def single_file(names: Iterable[str], variant: str) -> str | None:
    """The name of the one file of weights of that variant."""
    wanted = {f"{stem}{variant and '.'}{variant}.safetensors" for stem in STEMS}
    return next((name for name in sorted(names) if name in wanted), None)


def index_file(names: Iterable[str], variant: str) -> str | None:
    """The name of the index of that variant's files."""
    return next((name for name in sorted(names) if _INDEX.fullmatch(name) and variant_of(name) == variant), None)


def required_files(names: Sequence[str], part: str | None, asked: str | None, where: str) -> list[str]:
    """Of the files of a repository, those that are read: of the whole checkpoint or, with `part` (vae, controlnet), of
    that one, which may be a folder or the repository itself. Raises as `chosen`."""
    if part is None:
        folders: Sequence[str] = _FOLDERS
        found = [name for name in names if name in _FILES]
    else:
        folders = [part] if any(name.startswith(f"{part}/") for name in names) else [""]
        found = []
    for folder in folders:
        prefix = f"{folder}/" if folder else ""
        inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        inside = [name for name in inside if "/" not in name]
        found += [prefix + name for name in _of_folder(inside, asked, f"{where}/{folder}".rstrip("/"))]
    return found


def _of_folder(names: Sequence[str], asked: str | None, where: str) -> list[str]:
    configs = [name for name in names if name.endswith(".json") and not _INDEX.fullmatch(name)]
    variant = choose_variant(names, asked, where)
    if variant is None:
        return configs
    single = single_file(names, variant)
    if single is not None:
        return [*configs, single]
    index = index_file(names, variant)
    shards = [name for name in names if _FILE.fullmatch(name) and variant_of(name) == variant]
    # An index may name its files as it likes.
    shards = shards or [name for name in names if name.endswith(".safetensors") and not _FILE.fullmatch(name)]
    return [*configs, *([] if index is None else [index]), *shards]
