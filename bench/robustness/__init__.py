"""Fault injection (chaos) and malformed input (fuzz)."""
