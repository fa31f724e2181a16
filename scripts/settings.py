"""What make cannot take as a setting: says which one, and what it may be. Run by make when it sees such a setting.

It may be run by any Python 3 that a machine has, before the right one is installed: nothing newer than 3.7 here and in errors.py.
"""

import difflib
import json
import os
from pathlib import Path
from typing import Dict, List, Sequence

from scripts import reports

# Characters that a makefile, or the shell in its recipes, would not take as part of a word.
NOT_IN_WORDS = " \t\n$#%;'\"`&|<>()[]{}*?!~\\"
DTYPES = ("float16", "bfloat16", "float32")
# name -> a value that would do; the second group may also be empty (then it is derived)
NUMBERS = {
    "TP": 2,
    "PP": 1,
    "MAX_BATCH_SIZE": 8,
    "MAX_TOKENS": 48,
    "HTTP_PORT": 8000,
    "GRPC_PORT": 8001,
    "METRICS_PORT": 8002,
    "OPENAI_PORT": 9000,
}
SECRETS = ("META_URL", "MIRROR_URL", "HF_TOKEN")
NUMBERS_OR_EMPTY = {"CONTEXT": 4096, "MAX_INPUT_LEN": 2048, "MAX_SEQ_LEN": 4096, "MAX_NUM_TOKENS": 8192}


def problem(name: str, settings: Dict[str, str], presets: Sequence[str], toolchains: Sequence[str]) -> reports.Problem:
    """Why make refuses the setting `name`. settings: all that make knows, name -> value as typed."""
    if name in SECRETS:
        return reports.fetching.secret_typed(name)
    if name not in settings:
        near = difflib.get_close_matches(name.upper(), settings, 1, 0)
        return reports.settings.no_such_setting(name, sorted(settings), near[0] if near else "MODEL")
    value = settings[name]
    bad = sorted(
        {
            character
            for character in value
            if character in NOT_IN_WORDS or (character == ":" and name not in ("HOST", "SOURCE"))
        }
    )
    if name == "SOURCE" and "://" in value and ("?" in value or "@" in value):
        return reports.fetching.secret_in_source()
    if name in ("MODEL", "WEIGHTS", "SOURCE", "PYTHON", "CHAT_TEMPLATE", "API_KEY_FILE") and bad:
        return reports.settings.path_not_for_make(name, value, bad)
    if name == "MODEL":
        return reports.settings.no_such_model(value, presets)
    if name == "WEIGHTS":
        if "/" in settings["MODEL"] and value != settings["MODEL"]:
            return reports.settings.weights_named_twice(settings["MODEL"], value)
        name = "MODEL" if value == settings["MODEL"] else "WEIGHTS"
        return reports.settings.weights_not_there(name, value, settings.get("SOURCE", ""))
    if name == "PYTHON":
        return reports.packages.interpreter_missing(value)
    if name == "TOOLCHAIN":
        return reports.settings.bad_setting(
            name, value, "one of " + ", ".join(toolchains), reports.make("serve", TOOLCHAIN=toolchains[0])
        )
    if name == "PP" and settings["ENGINE"] == "torch" and value.isdigit():
        return reports.settings.bad_setting(name, value, "1 with ENGINE=torch", reports.make("serve", PP=1))
    allowed, example = {
        "ENGINE": ("torch or tensorrt", "torch"),
        "DTYPE": (", ".join(DTYPES) + ", or empty for the type of the weights", DTYPES[0]),
        "STREAMING": ("on or off", "on"),
        "PAD_HEADS": ("on or off; with QUANT off", "off"),
        "KV_REUSE": ("off; with ENGINE=tensorrt also on", "off"),
        "QUANT": ("empty; with ENGINE=tensorrt also int8_wo, int4_awq, fp8 or sq", ""),
        "CHAT_TEMPLATE": ("a Jinja file that is there, or empty for the model's own template", ""),
        "API_KEY_FILE": ("a file that is there, with one API key a line, or empty", ""),
        "HOST": ("an address of this machine, for instance 127.0.0.1, 0.0.0.0 or ::1", "127.0.0.1"),
        "REHEARSAL": (
            "the GPUs to stand in for, for instance 2x A100-80GB, with ENGINE=tensorrt (docker/README.md)",
            "2x A100-80GB",
        ),
        "ASSUME_GPU": (
            "the GPUs to assume, for instance 4x V100-SXM2-16GB, and only in make plan, make doctor and make -n: nothing is built for it",
            "",
        ),
        **{number: ("a whole number of at least 1", str(fit)) for number, fit in NUMBERS.items()},
        **{number: ("a whole number of at least 1, or empty", str(fit)) for number, fit in NUMBERS_OR_EMPTY.items()},
    }[name]
    engine = {"ENGINE": "tensorrt"} if name == "REHEARSAL" else {}
    return reports.settings.bad_setting(name, value, allowed, reports.make("serve", **engine, **{name: example}))


def main() -> None:
    root = Path(__file__).parent.parent
    names: List[str] = os.environ["REFUSED_NAMES"].split()
    lines = os.environ["REFUSED_SETTINGS"].splitlines()
    settings = dict(line.strip().split("=", 1) for line in lines if "=" in line)
    presets = sorted(path.stem for path in (root / "models").glob("*.mk"))
    raise problem(names[0], settings, presets, list(json.loads((root / "docker/toolchains.json").read_text())))


if __name__ == "__main__":
    reports.run(main)
