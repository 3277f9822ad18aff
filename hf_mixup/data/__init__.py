"""Images: sources, transforms, data sets and batches."""
