"""What a search found, as data."""
