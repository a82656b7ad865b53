"""The decoder on a CPU: convolutions packed for oneDNN, in 8 bits, and with half of the products."""
