"""Many GPUs on many hosts: the same app and engine as `python -m server`, replicated by Ray Serve (extra `ray`)."""
