"""Where weights may be fetched from: Meta's download, the Hugging Face hub, an HTTPS mirror, an object store,
a folder, a Python package.

    meta:llama-2-7b               Meta's download; the URL of the licence mail is in META_URL, or in META_URL_FILE's
    file hf:meta-llama/Llama-2-7b-hf   the hub, at a commit: hf:NAME@COMMIT, or the newest one at the first try
    https://mirror/llama-2-7b     a plain mirror, in Meta's or Hugging Face's form; a login or a query: see mirror_url()
    s3://bucket/llama-2-7b        an object store that the library obstore knows (also gs://, az://)
    /mnt/llama-2-7b               a folder, perhaps a mount
    pip:FILE                      a GGUF file in a Python package; FILE names it with its hash, as pip's requirements do

Secrets come from the environment or from files, never from the command line; no message and no manifest holds one.
"""

from __future__ import annotations

import re
from pathlib import Path

from scripts import reports
from scripts.fetching.folder import Folder
from scripts.fetching.hub import Hub
from scripts.fetching.meta import Meta, meta_url
from scripts.fetching.mirror import Mirror
from scripts.fetching.source import NAME, Source, without_secret
from scripts.fetching.store import Store


def find(source: str, output: Path, revision: str | None = None) -> Source:
    """The source that the setting SOURCE names. revision: the commit that an interrupted try began with."""
    kind, colon, rest = without_secret(source).partition(":")
    if kind == "meta" and colon and NAME.fullmatch(rest):
        return Meta(rest, meta_url())
    if kind == "hf" and colon and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", rest):
        return Hub(rest.partition("@")[0], rest.partition("@")[2] or revision, source)
    if kind in ("http", "https") and rest.startswith("//"):
        return Mirror(source)
    if colon and rest.startswith("//"):
        return Store(source)
    if "/" in source and not colon:
        return Folder(source)
    raise reports.fetching.no_such_source(source)
