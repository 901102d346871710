"""Serving in a cluster: a worker that vLLM's front ends can drive, and a client that drives workers.

`wire` the messages → `endpoint` where they may come from → `service` what they do to an engine → `stepper` its thread
→ `link` one front end's sockets → `worker` all of it. `client` is the other end. `kv_events` tells routers what is
cached; `dynamo` is the same engine under Dynamo's runtime.
"""
