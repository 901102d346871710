"""Workers over ZeroMQ, their front ends, and KV cache events.

`wire` defines vLLM's messages and `endpoint` opens sockets. A worker is made of `service` (what messages do to an
engine), `worker_thread` (the engine's thread), `link` (the sockets of one front end) and `worker` (the I/O loop). A
front end is made of `front` (sockets), `balancer` (choice of a worker) and `client` (the API). `kv_events` publishes KV
cache events, and `kv_subscriber` follows those of workers.
"""
