"""Projected times from counted operations and bytes."""
