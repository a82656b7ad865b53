"""Capacity planning: the server's own queue and scaling rules, simulated on virtual time."""
