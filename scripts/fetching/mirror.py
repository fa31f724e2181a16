"""An HTTPS mirror: a folder of files."""

from __future__ import annotations

import os
from urllib.parse import quote, unquote, urlsplit

from scripts import reports
from scripts.fetching.http import Http, HttpSource, _secret_url
from scripts.fetching.source import (
    Remote,
    _named_by,
    _public_url,
    _sha256,
    checklist,
    public_name,
)
from scripts.weights import files


def mirror_url(source: str) -> str:
    """The URL of a mirror with its secrets (user:password@, or ?token=): MIRROR_URL, or the content of the file that
    MIRROR_URL_FILE names; empty if neither is set. SOURCE is the same URL without the secrets."""
    url = _secret_url("MIRROR_URL", reports.fetching.mirror_url_odd)
    if not url and not os.environ.get("MIRROR_URL_FILE", ""):
        return ""
    try:
        name = _public_url(url)
    except ValueError:
        name = ""
    if name != public_name(source):
        shown = f"it is for {name}" if name.startswith("http") and "@" not in name else f"it has {len(url)} characters"
        raise reports.fetching.mirror_url_odd(f"SOURCE is {public_name(source)}, and {shown}")
    return url


class Mirror(HttpSource):
    """A plain server with the files of one model, in Meta's form (it has a checklist.chk) or in Hugging Face's."""

    def __init__(self, url: str) -> None:
        import urllib3

        self.name, secret = public_name(url), mirror_url(url)
        parts = urlsplit(secret or url)
        user, _, password = parts.netloc.rpartition("@")[0].partition(":")
        login = f"{unquote(user)}:{unquote(password)}"
        super().__init__(Http(self.name, urllib3.make_headers(basic_auth=login) if login != ":" else {}))
        self.secret, self.query = bool(secret), parts.query

    def url(self, key: str) -> str:
        return f"{self.name}/{quote(key)}" + (f"?{self.query}" if self.query else "")

    def refused(self, name: str, status: int) -> reports.Problem:
        if status in (401, 403):
            return reports.fetching.mirror_refused(name, self.name, status, self.secret)
        return super().refused(name, status)

    def files(self) -> list[Remote]:
        first, second = files.CHECKLISTS
        data = self.small(first)
        if data is not None:
            lists = checklist(data, first, self.name)
            digests = {first: _sha256(data)}
            tokens = self.small(second)
            if tokens is not None:
                lists.update(checklist(tokens, second, self.name))
                digests[second] = _sha256(tokens)
            digests.update({name: {"md5": md5} for name, md5 in lists.items()})
            names = {files.PARAMS, "tokenizer.model", *digests}
            return [self.remote(name, name, digests.get(name)) for name in sorted(names)]
        read = {name: data for name in files.HF_FILES if (data := self.small(name)) is not None}
        if "config.json" not in read:
            raise reports.fetching.fetch_odd(
                first, self.name, "it has neither this file (Meta's form) nor config.json (Hugging Face's)"
            )
        for suffix, index in files.INDEXES.items():
            single = index.replace(".index.json", "")
            data = self.small(index)
            if data is not None:
                weights = _named_by(data, index, suffix, self.name)
                read[index] = data
            elif self._there(single):
                weights = [single]
            else:
                continue
            digests = {name: _sha256(data) for name, data in read.items()}
            return [self.remote(name, name, digests.get(name)) for name in sorted({*digests, *weights})]
        raise reports.fetching.fetch_odd(files.SINGLE, self.name, "neither it nor an index of several files is there")

    def _there(self, key: str) -> bool:
        response = self._tried(key)
        response.close()
        return bool(response.status < 400)
