"""The dtype of each module at each precision of a build."""

from collections.abc import Mapping

import torch

from engines.backends.base import ModuleName

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def module_precision(precision: str, name: ModuleName) -> str:
    """Returns the precision of one module: fp8 is for the transformer alone, the autoencoder runs in fp16 then."""
    return "fp16" if precision == "fp8" and name != "transformer" else precision


def module_dtype(precision: str) -> torch.dtype:
    """Returns the dtype of weights and half-precision inputs; fp8 graphs are fp16 graphs with quantised products."""
    return DTYPES["fp16" if precision == "fp8" else precision]
