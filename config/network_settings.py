"""Settings of outgoing connections: proxies and trusted certificates."""

from __future__ import annotations

import urllib.request
from functools import partial

from config.loading import HomePathText, PartSettings, load_part


class NetworkSettings(PartSettings):
    """The settings of every HTTP client; ``.env.example`` explains each."""

    proxy_from_environment: bool = False
    ssl_cert_file: HomePathText | None = None
    ssl_cert_dir: HomePathText | None = None
    requests_ca_bundle: HomePathText | None = None


def environment_proxy(scheme: str, host: str) -> tuple[str, str] | None:
    """Return the variable that names a proxy for *host*, and the proxy's address; None if there is none (NO_PROXY)."""
    proxies = urllib.request.getproxies_environment()
    for kind in (scheme, "all"):
        if address := proxies.get(kind):
            bypass = urllib.request.proxy_bypass_environment(host, proxies)  # type: ignore[attr-defined]
            return None if bypass else (f"{kind.upper()}_PROXY", address if "://" in address else f"http://{address}")
    return None


load_network_settings = partial(load_part, NetworkSettings)
