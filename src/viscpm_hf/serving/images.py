"""Images that come with requests: data URIs, plain base64, and addresses on hosts that are allowed."""

from __future__ import annotations

import base64
import binascii
import ipaddress
import socket
import time
from urllib.parse import SplitResult, urlsplit

from ..images import BadImageError


REMOTE_TIMEOUT_SECONDS = 10.0
MAX_REMOTE_BYTES = 32 * 2**20

_WHITESPACE = b" \t\r\n\f\v"
_WEB_ALPHABET = bytes.maketrans(b"-_", b"+/")


def is_remote(url: str) -> bool:
    return url.partition(":")[0].lower() in ("http", "https")


def read_image_url(url: str, allowed_hosts: tuple[str, ...], remote: dict[str, bytes] | None = None) -> bytes:
    """The file of an `image_url`.

    Args:
        allowed_hosts: where files may be fetched from.
        remote: what was [`fetch`]ed already, by its address.

    Raises:
        BadImageError: if it is none, or somewhere that may not be looked at.
    """
    if url[:5].lower() == "data:":
        return read_data_uri(url)
    if is_remote(url):
        return remote[url] if remote and url in remote else fetch(url, allowed_hosts)
    raise BadImageError(
        "An image_url is a data URI (data:image/png;base64,...)"
        + (" or an http(s) address" if allowed_hosts else "")
        + f", got {url[:40]!r}."
    )


def read_data_uri(uri: str) -> bytes:
    header, comma, data = uri.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise BadImageError(f"A data URI is data:image/...;base64,DATA, got one that begins with {header[:40]!r}.")
    return _decode_base64(data)


def read_base64(text: str) -> bytes:
    """Bytes of base64 text as clients send it: with line breaks, a data URI's head, the web's alphabet, or without."""
    return read_data_uri(text) if text[:5].lower() == "data:" else _decode_base64(text)


def _decode_base64(text: str) -> bytes:
    try:
        compact = text.encode("ascii").translate(_WEB_ALPHABET, _WHITESPACE)
        return base64.b64decode(compact + b"=" * (-len(compact) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        reason = "a character that isn't ASCII" if isinstance(error, UnicodeError) else str(error)
        raise BadImageError(f"The image is no valid base64: {reason}.") from error


# --------------------------------------------------------------------------------------------------- other hosts


def fetch(url: str, allowed_hosts: tuple[str, ...]) -> bytes:
    """The bytes at an address on an allowed host.

    Redirects are not followed. A name must not lead to an address of a private network (the server's own, or a cloud's
    metadata); the connection goes to the very address that was checked. An allowed host that is written as an IP
    address is taken at its word.
    """
    import httpx

    if not allowed_hosts:
        raise BadImageError("This server fetches no images from addresses: send a data URI (data:image/...;base64,).")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or {"http": 80, "https": 443}[parts.scheme]
    except ValueError as error:
        raise BadImageError(f"The image_url is no valid address: {error}.") from error
    if not host or parts.username or parts.password:
        raise BadImageError("An image_url has a host and no user name.")
    if not {host, f"{host}:{port}"} & {entry.lower() for entry in allowed_hosts}:
        raise BadImageError(f"Images may not be fetched from {host}:{port}; allowed: {', '.join(allowed_hosts)}.")
    address = _checked_address(host, port)
    deadline = time.monotonic() + REMOTE_TIMEOUT_SECONDS
    try:
        with (
            httpx.Client(timeout=REMOTE_TIMEOUT_SECONDS, follow_redirects=False, trust_env=False) as client,
            client.stream(
                "GET",
                _at_address(parts, address, port),
                headers={"Host": parts.netloc, "Accept-Encoding": "identity"},
                extensions={"sni_hostname": host},
            ) as response,
        ):
            if response.status_code != 200:
                raise BadImageError(f"The host answered {response.status_code} instead of the image.")
            data = bytearray()
            for chunk in response.iter_raw():  # as it comes: nothing that unpacks to more than was sent
                data += chunk
                if len(data) > MAX_REMOTE_BYTES:
                    raise BadImageError(f"The image has more than {MAX_REMOTE_BYTES:,} bytes.")
                if time.monotonic() > deadline:
                    raise BadImageError(f"The image did not come from {host} within {REMOTE_TIMEOUT_SECONDS:g} s.")
            return bytes(data)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise BadImageError(f"The image could not be fetched from {host}: {type(error).__name__}.") from error


def _checked_address(host: str, port: int) -> str:
    try:
        ipaddress.ip_address(host)
        return host
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise BadImageError(f"The host {host} has no address.") from error
    addresses = [entry[4][0] for entry in found]
    if not all(ipaddress.ip_address(address).is_global for address in addresses):
        raise BadImageError(f"The host {host} is in a private network.")
    return addresses[0]


def _at_address(parts: SplitResult, address: str, port: int) -> str:
    host = f"[{address}]" if ":" in address else address
    return parts._replace(netloc=f"{host}:{port}", fragment="").geturl()
