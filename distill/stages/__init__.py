"""Autoencoder, teacher, student, decoder fine-tuning, ControlNet."""
