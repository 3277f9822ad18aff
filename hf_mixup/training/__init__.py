"""The Trainer and its parts: optimisers, schedules, checkpoints, the Hub."""
