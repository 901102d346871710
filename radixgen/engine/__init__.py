"""The engine: requests in, outputs out, one step at a time.

engine            `Engine`: submit, step, generate, stream, score, fork, pin
async_engine      `AsyncEngine`: the same for coroutines
async_outputs     the output streams of `AsyncEngine`
thread            the thread that steps an engine, for `AsyncEngine` and for workers
core              one step: schedule, run, commit, draw, advance; token ids in and out
submitter         checking and making requests
pins              keeping prefixes cached, and computing them in advance
request_loop      requests from submission to their last output
request_options   keyword options of requests and pins
input_processor   tokenization of prompts, and checks of parameters
output_processor  text, stop strings, outputs
batch_draws       drawing the tokens of a step
sequence_updates  changes of a sequence: a new token, a fork, the end of a beam search
run_ahead         beginning the next step before the tokens of the last one are known
warm_up           running every kind of step once
throughput        a log line about throughput
profiler          a torch profiler trace of a few steps
check             the invariants between core, scheduler and tree
"""
