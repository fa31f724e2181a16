"""The command line, a preset and the defaults -> the value of every setting, and the names of impossible ones.

The standard library only, any Python from 3.8 on: this runs before anything is installed, at every make.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Mapping, NamedTuple, Sequence

from scripts import reports, settings

ROOT = Path(__file__).resolve().parents[2]
PLANNING = {"plan", "doctor"}
TESTING = {"test", "test-versions", "test-clients", "test-load", "test-image", "test-long"}
# fields of a config.json that say how many heads the model has; the room config reads all fields
SMALL_BYTES = 1 << 20
# words for the development of this project, and words that use no weights
WITHOUT_WEIGHTS = {
    "weights",
    *TESTING,
    "lint",
    "lock",
    "lock-base",
    "pin",
    "synthetic",
    "help",
    "clean",
    "ask",
    "verify-image",
    "push",
    "bench-convert",
}
# words whose rooms are made for TP ranks; the others ask a running server, or depend on the model alone
SPLIT = {
    "checkpoint",
    "engines",
    "verified",
    "model_repo",
    "serve",
    "demo",
    "image",
    "size",
    "release",
    "chart",
    "bench",
    "bench-serve",
    "bench-text",
    "bench-openai",
    "soak",
}
# words that need no TensorRT-LLM version if none was named
WITHOUT_TOOLCHAIN = {*PLANNING, *TESTING, "lint", "lock", "pin", "help", "clean"}
LINE = re.compile(r"([A-Z_]+)\s*[:?]?=\s*([^#]*)(?:#.*)?")
# what several presets share; in a folder below models/, or it would be a preset itself
INCLUDE = re.compile(r"include\s+(models/families/[\w.-]+\.mk)")


class Typed(NamedTuple):
    """What was typed. settings: name -> value; asked: make -n or -q; below: by another make,
    which may have its own settings."""

    goals: Sequence[str]
    settings: Mapping[str, str]
    asked: bool = False
    below: bool = False

    @property
    def goal(self) -> str:
        """The one word that was typed; empty for several."""
        return self.goals[0] if len(self.goals) == 1 else ""


def toolchains() -> list[str]:
    """The TensorRT-LLM versions that TOOLCHAIN may name, oldest first."""
    return list(json.loads((ROOT / "docker" / "toolchains.json").read_text()))


def presets() -> list[str]:
    return sorted(path.stem for path in Path("models").glob("*.mk"))


def preset(path: Path, name: str = "") -> dict[str, str]:
    """The settings of a preset; a Problem for a line that is not one. name:
    what $(MODEL) is in a file that presets share."""
    found = {}
    for line in path.read_text().splitlines():
        match, shared = LINE.fullmatch(line.strip()), INCLUDE.fullmatch(line.strip())
        if match and match[1] in settings.NAMES:
            found[match[1]] = match[2].strip().replace("$(MODEL)", name or path.stem)
        elif shared and Path(shared[1]).is_file():
            found.update(preset(Path(shared[1]), name or path.stem))
        elif line.strip() and not line.lstrip().startswith("#"):
            raise reports.settings.no_preset(path, line)
    return found


def values_of(typed: Mapping[str, str]) -> dict[str, str]:
    """The value of every setting: the command line, else the preset, else the default.
    The environment never decides."""
    known = {
        name: value if settings.BY_NAME[name].free else " ".join(value.split(" ")).strip(" \t\r\n")
        for name, value in typed.items()
        if name in settings.NAMES
    }
    model = known.get("MODEL", settings.BY_NAME["MODEL"].default)
    path = Path("models") / f"{model}.mk"
    named = settings.fits(settings.BY_NAME["MODEL"], model) and "/" not in model and path.is_file()
    values = {setting.name: setting.default for setting in settings.TABLE}
    values.update(preset(path) if named else {})
    values.update(known)
    for name in ("HOST", "OPENAI_HOST"):
        if values[name] == "localhost":  # docker publishes ports at addresses only
            values[name] = "127.0.0.1"
    if "/" in model and "WEIGHTS" not in known:
        values["WEIGHTS"] = model
    return values


def refused(typed: Typed, values: Mapping[str, str]) -> list[str]:
    """The refused settings: unknown names, wrong values, and values that this project or this machine does not have."""
    unknown = [] if typed.below else [name for name in typed.settings if name not in settings.NAMES]
    names = [*sorted(unknown, key=lambda name: name not in settings.SECRETS), *settings.wrong(values)]
    source = values["SOURCE"]
    if re.match(r"https?://[^/]*@", source):
        names.append("SOURCE")
    if names:
        return list(dict.fromkeys(names))
    model, goals = values["MODEL"], set(typed.goals)
    missing = {
        "MODEL": "/" not in model and not (Path("models") / f"{model}.mk").is_file(),
        "WEIGHTS": "/" in model and "WEIGHTS" in typed.settings,
        "TOOLCHAIN": values["TOOLCHAIN"] not in ("", *toolchains()),
        "CHAT_TEMPLATE": values["CHAT_TEMPLATE"] and not os.path.isfile(values["CHAT_TEMPLATE"]),
        "API_KEY_FILE": values["API_KEY_FILE"] and not os.path.isfile(values["API_KEY_FILE"]),
        "PYTHON": values["PYTHON"] and not runs(values["PYTHON"]),
        "ASSUME_GPU": values["ASSUME_GPU"]
        and values["ENGINE"] == "tensorrt"
        and not typed.asked
        and bool(goals - WITHOUT_TOOLCHAIN),
    }
    names = [name for name, is_missing in missing.items() if is_missing]
    if not names and not typed.asked and goals - WITHOUT_WEIGHTS and "weights" not in goals and not at_hand(values):
        names = ["WEIGHTS"]
    return names


def at_hand(values: Mapping[str, str]) -> bool:
    """Whether the weights are there, or can be fetched: Meta's only with the URL that Meta sends."""
    if os.path.isdir(values["WEIGHTS"]):
        return True
    if values["SOURCE"].startswith("meta:"):
        return bool(os.environ.get("META_URL") or os.environ.get("META_URL_FILE"))
    return bool(values["SOURCE"])


def runs(python: str) -> bool:
    """Whether an interpreter is there and works."""
    try:
        done = subprocess.run(
            [python, "-c", "print(7)"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False
        )
    except OSError:
        return False
    return done.stdout.strip() == b"7"


def nearest_word(goal: str, words: Sequence[str]) -> str:
    """The word of the Makefile that a goal is or resembles most. A file may be a goal too."""
    if goal in words or "/" in goal or "." in goal:
        return goal
    return settings.nearest(goal.lower(), sorted(words))


def check_split(values: Mapping[str, str], goal: str) -> None:
    """A Problem for ranks that cannot share the model, if its shape is known before it is read: a preset's,
    or its folder's."""
    tp_size = int(values["TP"])
    sizes = sizes_known(values)
    if tp_size == 1 or not sizes or all(size % tp_size == 0 for size in sizes):
        return
    from scripts.weights import shape as shapes

    folder = Path(values["WEIGHTS"])
    try:
        if (folder / "params.json").is_file():
            shape = shapes.read_params(folder / "params.json").shape(0)
        elif (folder / "config.json").is_file():
            shape = shapes.shape_of_config(shapes.read_json(folder / "config.json"), folder / "config.json")
        else:
            table = ROOT / "models" / "shapes.json"
            shape = shapes.params_of(json.loads(table.read_text())[values["MODEL"]], table).shape(0)
    except reports.Problem:  # the room that reads the file reports it better
        return
    impossible = shapes.why_impossible(shape, tp_size, values["PAD_HEADS"] == "on")
    if impossible:
        by_padding = shapes.why_impossible(shape, tp_size, pad_heads=True) is None
        possible = shapes.possible_tp_sizes(shape)
        raise reports.checkpoint.split_impossible(
            values["MODEL"], tp_size, *impossible, possible, by_padding, goal or "serve"
        )


def sizes_known(values: Mapping[str, str]) -> set[int]:
    """The numbers of heads and of key/value heads, if a small file has them: a cheap first check."""
    folder = Path(values["WEIGHTS"])
    for path in (folder / "params.json", folder / "config.json", ROOT / "models" / "shapes.json"):
        if not path.is_file():  # it may be a pipe without a writer
            continue
        try:
            with path.open("rb") as file:
                found = json.loads(file.read(SMALL_BYTES))
            found = found.get(values["MODEL"], {}) if path.name == "shapes.json" else found
            sizes = [
                found.get(name) for name in ("n_heads", "n_kv_heads", "num_attention_heads", "num_key_value_heads")
            ]
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
        if any(sizes):
            return {size for size in sizes if isinstance(size, int) and size > 0}
    return set()
