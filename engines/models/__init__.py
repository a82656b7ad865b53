"""The networks, one printable file each."""
