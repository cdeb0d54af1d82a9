"""SGLang on a machine without a GPU: the real engine over an out-of-tree platform, no kernel package, no Triton.

`platform` is SGLang's own extension point (entry point group `sglang.srt.platforms`), `standins` lets it import where
packages that it never runs here are missing, and `engine` starts its processes so that they find both.
"""
