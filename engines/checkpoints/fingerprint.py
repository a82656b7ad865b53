"""Compares parts of checkpoints by content, wherever their files lie: text encoders, and decoders by their digest."""

import hashlib
from pathlib import Path

from engines.checkpoints.checkpoint import Checkpoint
from engines.checkpoints.lora import FusedWeights
from engines.checkpoints.random_weights import RandomWeights
from engines.checkpoints.weights import Component, FolderWeights, WeightSource, file_stamps, sha256_of, weight_files


def equal_text_encoders(one: Checkpoint, other: Checkpoint) -> bool:
    """Returns True if two checkpoints embed every prompt equally: configs, tokenizers and weights are the same.

    Hashes the weights only if everything else agrees and the files are not the same ones. Raises CheckpointError.
    """
    settings = [(each.settings.instruction, each.settings.max_prompt_tokens) for each in (one, other)]
    if settings[0] != settings[1] or one.text != other.text:
        return False
    first, second = _source(one.weights), _source(other.weights)
    if isinstance(first, RandomWeights) or isinstance(second, RandomWeights):
        return first == second
    if not isinstance(first, FolderWeights) or not isinstance(second, FolderWeights):
        return False
    tokenizers = [_read(each.folders["tokenizer"] / "tokenizer.json") for each in (first, second)]
    if tokenizers[0] != tokenizers[1]:
        return False
    files = [weight_files(each.folders["text_encoder"], each.variant) for each in (first, second)]
    if [path.resolve() for path in files[0]] == [path.resolve() for path in files[1]]:
        return True
    sizes = [[path.stat().st_size for path in paths] for paths in files]
    return sizes[0] == sizes[1] and first.text_digests == second.text_digests


def decoder_stamps(checkpoint: Checkpoint) -> list[list[object]]:
    """Returns the stamps of the decoder's files (engines.checkpoints.weights.file_stamps)."""
    return file_stamps(_source(checkpoint.weights), _decoder_component(checkpoint))


def decoder_sha256(checkpoint: Checkpoint) -> str:
    """Returns a hex digest of the decoder's files, or of the seed of random weights. Raises CheckpointError."""
    weights = _source(checkpoint.weights)
    if not isinstance(weights, FolderWeights):
        return weights.sha256()
    files = weight_files(weights.folders[_decoder_component(checkpoint)], weights.variant)
    return hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest()


def _decoder_component(checkpoint: Checkpoint) -> Component:
    """Returns the component whose files hold the decoder: a TAESANA, or the autoencoder."""
    return "vae" if checkpoint.taesana is None else "decoder"


def _source(weights: WeightSource) -> WeightSource:
    """Returns the source without adapters, which the text encoder has none of."""
    return weights.base if isinstance(weights, FusedWeights) else weights


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None
