"""How a cache salt becomes a namespace, for a worker and for a front end that knows its key."""

import hashlib
import hmac


def salted_namespace(salt: str, key: bytes) -> str:
    """The namespace of requests with this salt: a hash by a secret key. Without a salt, that of all that have none."""
    if not salt:
        return ""
    text = salt.encode()
    tagged = b"salt" + len(text).to_bytes(8, "big") + text
    return "salt:" + hmac.new(key, tagged, hashlib.sha256).hexdigest()
