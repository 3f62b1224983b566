"""The guest: its image, its machine, and what runs inside of it."""
