"""What the autoencoder alone needs, on pictures with a border: their layout, and tiles of convolutions."""
