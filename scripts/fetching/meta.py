"""Meta's download, with the URL of the licence mail."""

from __future__ import annotations

from urllib.parse import urlsplit

from scripts import reports
from scripts.fetching.http import Http, HttpSource, _secret_url
from scripts.fetching.source import Remote, _sha256, checklist
from scripts.weights import files


def meta_url() -> str:
    """The presigned URL of Meta's licence mail: META_URL, or the content of the file that META_URL_FILE names."""
    url = _secret_url("META_URL", reports.fetching.no_meta_url)
    if not url:
        raise reports.fetching.no_meta_url("neither META_URL nor META_URL_FILE is set")
    parts = urlsplit(url)
    if parts.scheme not in ("https", "http") or not parts.hostname or "*" not in parts.path:
        raise reports.fetching.no_meta_url(
            f"what was given has {len(url)} characters, "
            f"{'begins with https://' if url.startswith('https://') else 'no https:// in front'} and "
            f"{'a' if '*' in url else 'no'} * where the file's name goes"
        )
    return url


class Meta(HttpSource):
    """Like Meta's download.sh: the name of each file replaces the * in the URL."""

    def __init__(self, folder: str, url: str) -> None:
        super().__init__(Http(url))
        self.folder, self.template = folder, url
        self.name = f"meta:{folder}"

    def url(self, key: str) -> str:
        return self.template.replace("*", key, 1)

    def refused(self, name: str, status: int) -> reports.Problem:
        if status in (400, 401, 403):
            return reports.fetching.meta_link_refused(name, self.name, status)
        return super().refused(name, status)

    def files(self) -> list[Remote]:
        lists: dict[str, str] = {}
        digests: dict[str, dict[str, str]] = {}
        found: list[tuple[str, str]] = []
        first, second = files.CHECKLISTS
        for name, key in ((first, f"{self.folder}/{first}"), (second, second)):
            data = self.small(key)
            if data is None:
                raise reports.fetching.fetch_refused(name, self.name, 404)
            lists.update(checklist(data, name, self.name))
            digests[name] = _sha256(data)
            found.append((name, key))
        found += [
            (name, f"{self.folder}/{name}")
            for name in {files.PARAMS, *lists}
            if name != "tokenizer.model" and name not in dict(found)
        ]
        found.append(("tokenizer.model", "tokenizer.model"))
        digests.update({name: {"md5": md5} for name, md5 in lists.items()})
        return [self.remote(name, key, digests.get(name)) for name, key in sorted(found)]
