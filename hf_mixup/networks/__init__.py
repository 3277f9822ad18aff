"""The networks that are trained: where they come from, where families keep what methods read, how they are watched."""
