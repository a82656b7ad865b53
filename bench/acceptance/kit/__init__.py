"""What a GPU host without network lacks to be accepted, packed; and what runs there."""
