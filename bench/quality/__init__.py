"""Scores per backend and precision; the cost of fp8."""
