"""Rollout Router Replay: train mixture-of-experts policies on the experts that the inference engine chose."""

__version__ = "0.1.0"
# Tells these three packages from others of the same name, see `r3._identity`.
__r3__ = True
