"""Derive namespaces from cache salts; workers and front ends with the same key derive the same ones."""

import hashlib
import hmac


def salted_namespace(salt: str, key: bytes) -> str:
    """Namespace of requests with this cache salt: a hash keyed by `key`; empty without a salt."""
    if not salt:
        return ""
    text = salt.encode()
    tagged = b"salt" + len(text).to_bytes(8, "big") + text
    return "salt:" + hmac.new(key, tagged, hashlib.sha256).hexdigest()
