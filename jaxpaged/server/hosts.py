"""Which names in the Host header are this server's: a page elsewhere, whose name is made to lead here, has another."""

import ipaddress
from collections.abc import Iterable


class AllowedHosts:
    """localhost, every address in digits, the host that is listened on, and the names that the operator adds.

    DNS rebinding needs a name that the attacker's server answers for, so addresses in digits are no danger.

    Args:
        allowed: Names with commas between them; "*" is any.
    """

    def __init__(self, host: str, allowed: str | None) -> None:
        added = [] if allowed is None else [name.strip().lower().rstrip(".") for name in allowed.split(",")]
        self._is_any = "*" in added
        self._names = frozenset(("localhost", host.lower().rstrip("."), *filter(None, added)))

    def allow(self, headers: Iterable[bytes]) -> bool:
        """Whether all values of the Host header are ours; without one (HTTP/1.0) no browser has asked."""
        return self._is_any or all(self._allows(value) for value in headers)

    def _allows(self, value: bytes) -> bool:
        name = value.decode("latin-1").strip().lower()
        if name.startswith("["):
            name, bracket, port = name[1:].partition("]")
            if not bracket or (port and not port.startswith(":")):
                return False
            port = port[1:]
        else:
            name, _, port = name.partition(":")
        if port and not (port.isascii() and port.isdigit()):
            return False
        name = name.rstrip(".")
        if name in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True
