"""Measurements: each program prints a table, then one JSON document as its last line."""
