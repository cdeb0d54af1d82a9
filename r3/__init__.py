"""Rollout Router Replay: train mixture-of-experts policies on the experts that the inference engine chose."""

__version__ = "0.1.0"
