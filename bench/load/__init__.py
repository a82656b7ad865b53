"""A server under load: latency, goodput, correct images; overload."""
