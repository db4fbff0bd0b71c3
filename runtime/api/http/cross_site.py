"""Protection against pages of other sites: recognizes their requests by the headers that browsers send."""

from starlette.datastructures import Headers

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
"""Methods that change nothing."""


def is_cross_site_change(method: str, headers: Headers) -> bool:
    """Return True if a page of another origin sent this request and the request may change something.

    Browsers send Sec-Fetch-Site to https and localhost. They send Origin with every unsafe request to another origin.
    Other clients send neither. This is the rule of Go's net/http.CrossOriginProtection.
    """
    if method in SAFE_METHODS:
        return False
    if site := headers.get("sec-fetch-site"):
        return site not in ("same-origin", "none")
    origin = headers.get("origin")
    return origin is not None and origin.lower().partition("://")[1:] != ("://", headers.get("host", "").lower())
