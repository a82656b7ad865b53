"""Samples out of a Prometheus exposition."""


def parse_samples(exposition: str) -> dict[str, float]:
    """Samples of a Prometheus exposition, by name and labels as they are written."""
    samples = {}
    for line in exposition.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            samples[name] = float(value)
    return samples
