"""TrigFlow wrap, sCM and LADD losses, discriminator: the paper as pure functions."""
