"""Networks: how they are loaded or made, where each family keeps its stages and attention, how they are watched."""
