"""Scores of held-out captions, ControlNet adherence, samplers."""
