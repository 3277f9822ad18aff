"""Images: where they come from, how they look to a network, batches of them."""
