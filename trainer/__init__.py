"""The trainer process, imported as `r3.trainer`: Megatron model, replay router, batching, loss and weight export."""

__r3__ = True
