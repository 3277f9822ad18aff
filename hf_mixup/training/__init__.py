"""The Trainer and what stands around it: arguments, optimisers, checkpoints, the Hub."""
