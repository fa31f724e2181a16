"""Where traces go (TRACES=on): what OpenTelemetry's own variables say, checked before anything is loaded.
The standard library only."""

from __future__ import annotations

import ipaddress
import os
import re
from typing import Mapping
from urllib.parse import urlsplit

from scripts import reports

# OpenTelemetry's own default
DEFAULT = "http://localhost:4318"
BASE, OWN = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
# they hold secrets, so only the endpoint sees them
HEADERS = ("OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS")
# what can be said in one way only: name -> the words that will do
WORDS = {
    "OTEL_EXPORTER_OTLP_PROTOCOL": ("http/protobuf",), "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": ("http/protobuf",),
    "OTEL_TRACES_EXPORTER": ("otlp",), "OTEL_EXPORTER_OTLP_COMPRESSION": ("none", "gzip", "deflate"),
    "OTEL_EXPORTER_OTLP_TRACES_COMPRESSION": ("none", "gzip", "deflate"),
    "OTEL_TRACES_SAMPLER": ("always_on", "always_off", "traceidratio", "parentbased_always_on", "parentbased_always_off",
                            "parentbased_traceidratio"),
}  # fmt: skip
NUMBERS = (
    "OTEL_EXPORTER_OTLP_TIMEOUT",
    "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT",
    "OTEL_BSP_SCHEDULE_DELAY",
    "OTEL_BSP_EXPORT_TIMEOUT",
    "OTEL_BSP_MAX_QUEUE_SIZE",
    "OTEL_BSP_MAX_EXPORT_BATCH_SIZE",
)
FILES = tuple(
    f"OTEL_EXPORTER_OTLP_{more}{name}"
    for more in ("", "TRACES_")
    for name in ("CERTIFICATE", "CLIENT_KEY", "CLIENT_CERTIFICATE")
)
SHARE = "OTEL_TRACES_SAMPLER_ARG"
MOST_WAITING = 1 << 16
# the SDK's defaults of these
QUEUE, BATCH = ("OTEL_BSP_MAX_QUEUE_SIZE", 2048), ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 512)
# All variables that a container gets (scripts/making/container.py)
NAMES = (
    BASE, OWN, *HEADERS, *WORDS, *NUMBERS, *FILES, SHARE, "OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES", "OTEL_SDK_DISABLED",
)  # fmt: skip


def collector_of(environment: Mapping[str, str] = os.environ) -> str:
    """The collector's address: of its path the SDK says more."""
    return environment.get(OWN) or environment.get(BASE) or DEFAULT


def is_loopback(endpoint: str) -> bool:
    host = urlsplit(endpoint).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def check_collector(environment: Mapping[str, str] = os.environ) -> None:
    """A Problem for what the SDK would ignore, or would fail of in the middle of serving."""
    set_now = {name: environment[name].strip() for name in NAMES if environment.get(name, "").strip()}
    for name in (BASE, OWN):
        if name in set_now and (wanted := _wrong_url(set_now[name])):
            raise reports.serving.bad_collector(name, wanted, "" if "@" in set_now[name] else set_now[name], DEFAULT)
    for name, words in WORDS.items():
        if name in set_now and set_now[name].lower() not in words:
            raise reports.serving.bad_collector(name, f"one of {', '.join(words)}", set_now[name], words[0])
    for name in NUMBERS:
        if name in set_now and not re.fullmatch(r"[1-9][0-9]{0,8}", set_now[name]):
            raise reports.serving.bad_collector(name, "a whole number of at least 1", set_now[name], "512")
    if SHARE in set_now and not re.fullmatch(r"0(\.[0-9]+)?|1(\.0+)?", set_now[SHARE]):
        raise reports.serving.bad_collector(SHARE, "a number from 0 to 1", set_now[SHARE], "0.1")
    waiting, batch = (int(set_now.get(name, default)) for name, default in (QUEUE, BATCH))
    if waiting > MOST_WAITING:
        raise reports.serving.bad_collector(QUEUE[0], f"at most {MOST_WAITING}", str(waiting), str(QUEUE[1]))
    if batch > waiting:
        raise reports.serving.bad_collector(
            BATCH[0], f"at most {QUEUE[0]}, which is {waiting}", str(batch), str(waiting)
        )
    for name in FILES:
        if name in set_now and not os.access(set_now[name], os.R_OK):
            raise reports.serving.bad_collector(
                name, "a file that can be read", set_now[name], "/etc/ssl/certs/ca-certificates.crt"
            )


def _wrong_url(value: str) -> str:
    """What is wrong with a URL, as the form that it should have; empty if nothing is. A password belongs into the
    headers: URLs are printed."""
    try:
        parts = urlsplit(value)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fine = False
    if not fine or re.search(r"[\s\x00-\x1f]", value):
        return "http://HOST:PORT or https://HOST:PORT"
    return "a URL without user and password; those go into OTEL_EXPORTER_OTLP_HEADERS" if "@" in parts.netloc else ""
