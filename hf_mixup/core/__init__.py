"""What every method is made of: plans, masks, randomness, policies, losses, checks. Needs only torch."""
