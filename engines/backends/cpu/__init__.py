"""The decoder on a CPU: convolutions packed for oneDNN, in 8 bits, or by Winograd's minimal filtering."""
