"""Reports of a run: cards, pictures, tables."""
