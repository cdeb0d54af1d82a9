"""A plugin for SGLang that stamps each routing row with the forward pass that wrote it, and returns rows cheaply.

SGLang keeps one routing row per KV slot in host memory and hands out, when a request finishes, whatever was last
written at its slots. Between a token's log-prob and the end of its request a row may have been written again
(retraction), or may have been written before a weight update (prefix cache); nothing in the answer tells. The plugin
(entry point `r3_provenance` of SGLang's official group `sglang.srt.plugins`) keeps one int32 beside each of those rows,
the number of the pass that wrote it, and of each request the pass behind each of its sampled tokens.

Why it holds under CUDA graphs: no number is made inside a forward pass. A captured graph writes expert ids into a
device buffer, replay after replay (in one copy, `onecopy`); the plugin acts where the host takes that buffer over, in
`on_forward_end`, which runs in Python after every pass, replayed or not. A pass gets its number there.

Why it holds under overlap scheduling: there the scatter into the host rows is put off until the pass is done
(`TopkCaptureOutput.finalize`), while the scheduler already prepares and starts the next pass. The number is put on the
pending output when the pass is started, and written with the same `out_cache_loc`, in the same call, as the rows are:
rows and stamps can never be of different passes. The weights behind a number are those in force when the pass was
started; SGLang takes weight updates in the same thread, between two passes. A token's number travels on its batch's
result, not through a variable that the next pass would overwrite.

Why it does not half-work: `plugin.register` looks at every name and parameter that it relies on and hooks all or
nothing; a layout in which rows reach slots by other ways than a forward pass (restored or received KV), or in which a
step is not one pass (speculation), stamps nothing; a row that no hooked pass wrote has stamp 0 and is reported as such.

Rows are kept compact (`rows`) and, for a client that asked for it (`client.open_returns`), handed over in shared memory
(`returns`, `r3.rollout.segment`). Everybody else gets what SGLang sends.
"""
