"""What the service may answer instead of data, and what keeps it from starting.

    ServiceError                 has status, title, detail; answered as problem+json by one handler in app.py
    ├── Unauthorized      401    no token, or not ours
    ├── Forbidden         403    a token that may only read, or a write that another site asked for
    ├── NotFound          404    no such run
    ├── TooLarge          413    a body over the limit
    ├── UnsupportedMedia  415    a body that is neither Arrow nor JSON
    ├── Invalid           422    a request that contradicts the schema or the run; says what exists
    ├── Busy              429    more batches wait than memory is set aside for: send it again later
    ├── TooOften          429    one client asks more often than it may
    ├── Unavailable       503    the store does not answer: send it again later
    ├── Crowded           503    as many event streams are open as may be
    └── StoreFull         507    the disk is full: nothing was stored
    CannotStart                  no HTTP: one line on stderr by __main__ and exit code 1
    └── StoreInUse               another process has the embedded store

A detail has three parts where they apply: what was wrong, what was got, what to do.
"""

# The tree's root ends in Error; its leaves are named after what the caller hears.
# ruff: noqa: N818

from __future__ import annotations

from typing import ClassVar


class ServiceError(Exception):
    """An answer other than the one asked for.

    Attributes:
        status: HTTP status.
        title: the same text for every error of a class (RFC 9457).
        detail: what was wrong this time.
    """

    status: ClassVar[int] = 500
    title: ClassVar[str] = "Internal error"

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class Unauthorized(ServiceError):
    status = 401
    title = "Token required"


class Forbidden(ServiceError):
    status = 403
    title = "Not allowed"


class NotFound(ServiceError):
    status = 404
    title = "Not found"


class TooLarge(ServiceError):
    status = 413
    title = "Body too large"


class UnsupportedMedia(ServiceError):
    status = 415
    title = "Unsupported media type"


class Invalid(ServiceError):
    status = 422
    title = "Invalid request"


class Busy(ServiceError):
    status = 429
    title = "Too many batches at once"


class TooOften(ServiceError):
    status = 429
    title = "Too many requests"


class Unavailable(ServiceError):
    status = 503
    title = "Store unavailable"


class Crowded(ServiceError):
    status = 503
    title = "Too many event streams"


class StoreFull(ServiceError):
    status = 507
    title = "Disk full"


class CannotStart(Exception):
    """The process cannot serve; the text is one line that says what to do."""


class StoreInUse(CannotStart):
    """Another process, most likely a service, has the embedded store open."""


def some(names: list[str], limit: int = 20) -> str:
    """Names for an error text: `a, b, c` or, past the limit, `a, b, ... (54 in all)`; `none` where there are none.

    >>> some(["a", "b", "c"], limit=2)
    'a, b, ... (3 in all)'
    """
    if not names:
        return "none"
    if len(names) <= limit:
        return ", ".join(names)
    return f"{', '.join(names[:limit])}, ... ({len(names)} in all)"
