"""Parses a Prometheus exposition."""


def parse_samples(exposition: str) -> dict[str, float]:
    """Returns sample values by name and labels as written, such as `a_total{status="200"}`."""
    values = {}
    for line in exposition.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            values[name] = float(value)
    return values
