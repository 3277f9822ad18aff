"""Steps whose masks are learned by a mixer: AutoMix, SAMix, AdAutoMix."""
