"""Times that the paper published."""

from collections.abc import Mapping

# Measured by the paper (arXiv 2503.09641) at 1024x1024, one image, bf16, in milliseconds: figure 1a (stages, 1.6B),
# table 2 (whole, 0.6B and 1.6B), section 1. (device, stage) -> by steps.
PAPER: Mapping[tuple[str, str], Mapping[int, str]] = {
    ("A100 SXM 80GB", "text upstream"): {1: "< 50", 2: "< 50", 4: "< 50"},
    ("A100 SXM 80GB", "denoise"): {1: "30", 4: "140"},
    ("A100 SXM 80GB", "decode upstream"): {1: "120", 2: "120", 4: "120"},
    ("A100 SXM 80GB", "total"): {1: "210, 210", 2: "250, 240", 4: "320, 310"},
    ("H100 SXM", "total"): {1: "100 to 180"},
    ("RTX 4090", "total"): {1: "310 (laptop)"},
}
