"""What the hardware is, how much memory is used, how long a stage took."""
