"""Checkpoint folders, hub ids, weights, ControlNet folders, random weights."""
