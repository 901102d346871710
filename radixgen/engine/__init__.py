"""The engine: requests in, outputs out, one step at a time.

engine            `Engine`: submit, step, generate, stream, score, fork, pin
async_engine      `AsyncEngine`: the same for coroutines; async_outputs: its streams
thread            the thread that steps an engine, for `AsyncEngine` and for workers
core              one step: schedule, run, commit, draw, advance; token ids in and out
request_loop      requests from submission to their last output; request_options: what each may set
input_processor   prompts and parameters, checked; output_processor: text, stop strings, outputs
batch_draws       the tokens of a step; sequence_updates: what they do to a sequence
run_ahead         the next step, begun before the tokens of the last one are known
warm_up           every kind of step once; check: the invariants between core, scheduler and tree
"""
