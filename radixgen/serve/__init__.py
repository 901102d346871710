"""Serving: the HTTP server (`http`), the live page (`live`), workers over ZeroMQ and their front ends (`zmq`), and
the engine under NVIDIA Dynamo (`dynamo`).
"""
