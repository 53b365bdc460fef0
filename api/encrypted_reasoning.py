"""Reasoning in a form that clients send back as it is: `encrypted_content` of Responses, and signatures of Messages.

Nothing in it is secret, since the same answer shows the reasoning. The digest tells ours from another server's, whose
content says nothing here, and from text that was changed by accident.
"""

import base64
import hashlib

PREFIX = "reasoning.v1."
_NUM_DIGEST = 12  # bytes


def encoded(text: str) -> str:
    content = text.encode()
    return PREFIX + base64.urlsafe_b64encode(_digest(content) + content).decode()


def decoded(value: str) -> str | None:
    """Returns the reasoning; None for what this server has not written."""
    if not value.startswith(PREFIX):
        return None
    try:
        content = base64.b64decode(value.removeprefix(PREFIX), altchars=b"-_", validate=True)
        digest, text = content[:_NUM_DIGEST], content[_NUM_DIGEST:]
        return text.decode() if digest == _digest(text) else None
    except ValueError:
        return None


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(PREFIX.encode() + content).digest()[:_NUM_DIGEST]
