"""The Hugging Face hub."""

from __future__ import annotations

from typing import Any

from scripts import reports
from scripts.fetching.http import Http, HttpSource
from scripts.fetching.source import NAME, Remote, _first_line
from scripts.weights import files


class Hub(HttpSource):
    """A repository of the Hugging Face hub, at one commit. The library huggingface_hub knows the address and the token
    (HF_TOKEN)."""

    def __init__(self, repository: str, revision: str | None, source: str) -> None:
        import huggingface_hub

        self.hub, self.repository = huggingface_hub, repository
        self.api = huggingface_hub.HfApi()
        self.token = huggingface_hub.get_token()
        self.asked = revision
        self.name = source.rstrip("/")
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        super().__init__(Http(str(self.api.endpoint), headers))

    def url(self, key: str) -> str:
        return str(self.hub.hf_hub_url(self.repository, key, revision=self.revision, endpoint=self.api.endpoint))

    def refused(self, name: str, status: int) -> reports.Problem:
        if status in (401, 403):
            return reports.fetching.hub_refused(self.repository, status, bool(self.token))
        return super().refused(name, status)

    def files(self) -> list[Remote]:
        info = self._info()
        self.revision = str(info.sha)
        by_name = {str(sibling.rfilename): sibling for sibling in info.siblings or ()}
        wanted = [name for name in files.HF_FILES if name in by_name]
        for suffix in (".safetensors", ".bin", ".gguf"):
            weights = [name for name in files.weights_among(by_name, suffix) if NAME.fullmatch(name)]
            if weights:
                wanted += weights + [name for name in (files.INDEXES.get(suffix),) if name in by_name]
                break
        else:
            raise reports.fetching.fetch_odd(
                files.SINGLE, self.name, f"there are no weights among its {len(by_name)} files"
            )
        if weights[0].endswith(".gguf") and len(weights) > 1:
            raise reports.fetching.fetch_odd(
                weights[0], self.name, f"it has {len(weights)} GGUF files; nothing says which one is meant"
            )
        return [self._remote(by_name[name]) for name in sorted(wanted)]

    def _remote(self, sibling: Any) -> Remote:
        name = str(sibling.rfilename)
        digests = (
            {"sha256": str(sibling.lfs.sha256)}
            if sibling.lfs
            else {"git-sha1": str(sibling.blob_id)}
            if sibling.blob_id
            else {}
        )
        return self.remote(name, name, digests, sibling.size)

    def _info(self) -> Any:
        known = self.hub.errors
        for _ in range(3):
            try:
                return self.api.model_info(self.repository, revision=self.asked, files_metadata=True, token=self.token)
            except known.GatedRepoError as error:
                raise reports.fetching.hub_refused(
                    self.repository, error.response.status_code, bool(self.token)
                ) from None
            except known.RepositoryNotFoundError:  # the hub says the same for a repository that this token may not see
                raise reports.fetching.hub_refused(
                    self.repository, 404 if self.token else 401, bool(self.token)
                ) from None
            except known.RevisionNotFoundError:
                raise reports.fetching.fetch_odd(self.asked or "main", self.name, "there is no such revision") from None
            except known.HfHubHTTPError as error:
                status = error.response.status_code
                if status in (401, 403, 404):
                    raise reports.fetching.hub_refused(self.repository, status, bool(self.token)) from None
                if status < 500:
                    raise reports.fetching.fetch_refused("the list of files", self.name, status) from None
                reason = f"the server answers {status}"
            except (
                Exception
            ) as error:  # an exception of the HTTP library; huggingface_hub has changed that library before
                reason = f"{type(error).__name__}: {_first_line(error)}"
        raise reports.fetching.fetch_broken("the list of files", self.name, reason, 0, None)
