"""Finds, builds or loads the engine that the settings ask for; the one door to the engines beyond their types."""
