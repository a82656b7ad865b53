"""Shared by all stages: resumable loop, EMA, Muon, encoded data, text encoder, checkpoint writer."""
