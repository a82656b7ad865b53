"""Facts of the hardware, used memory, and times of stages."""
