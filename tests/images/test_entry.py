"""What the image's environment says reaches the server, and what cannot be is a report."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts import reports, settings
from scripts.images import entry
from scripts.serving.launch import Operating

GIVEN = {
    "OPENAI_HOST": "0.0.0.0", "DRAIN_SECONDS": "60", "LAME_DUCK_SECONDS": "5", "METRICS": "off", "LOG": "json", "MODEL_ALIASES": "a,b",
    "CORS_ORIGINS": "https://chat.example", "TRACES": "on",
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*settings.OPERATING, "HOST", "OPENAI_WORKERS", "API_KEY_FILE", *settings.PORTS):
        monkeypatch.delenv(name, raising=False)


def test_without_an_environment_the_defaults_hold() -> None:
    found = entry.settings_of(Path("/srv"))
    assert found.operating == Operating() and found.host == "0.0.0.0" == found.host_of("OPENAI_PORT")


def test_every_setting_of_operating_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(GIVEN) == set(settings.OPERATING)
    for name, value in {**GIVEN, "HOST": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    found = entry.settings_of(Path("/srv"))
    assert {name: str(value) for name, value in vars(found.operating).items()} == {
        k.lower(): v for k, v in GIVEN.items()
    }
    assert (found.host_of("HTTP_PORT"), found.host_of("OPENAI_PORT")) == ("127.0.0.1", "0.0.0.0")
    assert found.openai_url == "http://127.0.0.1:9000"


@pytest.mark.parametrize("name", settings.OPERATING)
def test_a_value_that_cannot_be_is_a_report(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in filter(None, settings.wrong_values(settings.BY_NAME[name])):
        monkeypatch.setenv(name, value)
        with pytest.raises(reports.Problem) as told:
            entry.settings_of(Path("/srv"))
        assert name in told.value.report()
