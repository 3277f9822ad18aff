"""What people read of a run: cards, pictures, tables."""
