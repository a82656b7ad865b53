"""build_engine.py: export, quantise, compile, check parity, publish."""
