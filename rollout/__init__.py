"""The rollout process, imported as `r3.rollout`: Ray actor, engine adapters and decoders of recorded routing."""

__r3__ = True
