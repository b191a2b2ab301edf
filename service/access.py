"""Who may do what: the bearer tokens, and the browser's cookie that is made from one."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from ipaddress import ip_address
from typing import Final, Literal

from fastapi import Request
from pydantic import SecretStr

from service.errors import Forbidden, TooOften, Unauthorized
from service.rates import Rates
from service.settings import Settings

COOKIE: Final = "brn_token"
"""Name of the browser's cookie; its value is `cookie_value(token)`."""

_SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS"})

_HOST_OF_CONTAINERS: Final = ("host.docker.internal", "host.containers.internal")
"""What Docker Desktop and Podman call this machine in a container. ICANN gives names below .internal to nobody."""

Right = Literal["write", "read"]


def cookie_value(token: str) -> str:
    """What the browser's cookie holds: made from the token, but not the token itself."""
    return hmac.new(token.encode(), b"brn cookie", hashlib.sha256).hexdigest()


def right_of_token(settings: Settings, given: str) -> Right | None:
    """What a token allows; None: it is none of ours. Takes as long whatever is wrong with it."""
    return _matching(settings, given, lambda token: token)


def require_pace(request: Request) -> None:
    """Lets a request through whose client does not ask too often.

    Raises:
        TooOften: it does.
    """
    settings: Settings = request.app.state.settings
    rates: Rates = request.app.state.rates
    client = request.client.host if request.client is not None else ""
    if not rates.take(client):
        raise TooOften(
            f"{client} sends more than {settings.client_requests_per_second:g} requests a second "
            "(BRN_SERVICE_CLIENT_REQUESTS_PER_SECOND): ask again later"
        )


def require_token(request: Request) -> None:
    """Lets a request through that carries a token which allows it, as `Authorization: Bearer` or as the cookie.

    Raises:
        TooOften: its client asks more often than it may, with whatever token.
        Unauthorized: it carries none of ours.
        Forbidden: it wants to write with the token that may only read, or another site's page sent it, or may have.
    """
    require_pace(request)
    settings: Settings = request.app.state.settings
    writes = request.method not in _SAFE
    # The cookie is SameSite=Lax already; this also covers a service without a token, which any page could write to.
    if writes and request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        raise Forbidden("a page of another site may not write here")
    if settings.token is None:
        # A page's own name may be made to lead to this machine: to the browser we then are that page's own site.
        if not _is_name_of_this_machine(host := request.headers.get("host", "")):
            raise Forbidden(
                f"without a token only localhost, IP addresses and names without a dot are answered, got {host!r}: "
                "ask by one of these, or set BRN_SERVICE_TOKEN=$(openssl rand -hex 16), with which any name will do"
            )
        return
    scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
    right = right_of_token(settings, bearer.strip()) if scheme.lower() == "bearer" else None
    right = right or _matching(settings, request.cookies.get(COOKIE, ""), cookie_value)
    if right is None:
        raise Unauthorized("send the service's token as `Authorization: Bearer <BRN_SERVICE_TOKEN>`")
    if writes and right != "write":
        raise Forbidden("this token may only read (BRN_SERVICE_READ_TOKEN): writing takes BRN_SERVICE_TOKEN")


def _is_name_of_this_machine(host: str) -> bool:
    """Whether a Host header is no name that others could own: an address, without a dot, below localhost, a host's."""
    name = (host.partition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]).rstrip(".")
    if "." not in name or name.lower().endswith(".localhost") or name.lower() in _HOST_OF_CONTAINERS:
        return True
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _matching(settings: Settings, given: str, shown_as: Callable[[str], str]) -> Right | None:
    found: Right | None = None
    tokens: tuple[tuple[Right, SecretStr | None], ...] = (("read", settings.read_token), ("write", settings.token))
    for right, token in tokens:
        if token is not None and hmac.compare_digest(given.encode(), shown_as(token.get_secret_value()).encode()):
            found = right
    return found
