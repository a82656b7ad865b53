"""Samples out of a Prometheus exposition."""


def samples(exposition: str) -> dict[str, float]:
    """Samples of a Prometheus exposition, by name and labels as they are written."""
    found = {}
    for line in exposition.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            found[name] = float(value)
    return found
