"""Text in, pixels out: models, sampler, backends and artifacts. Knows tensors; knows no HTTP and no asyncio."""
