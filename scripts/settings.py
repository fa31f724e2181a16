"""The settings of make: one table, from which the checks, the reports, the pages and the tests all come.

Any Python from 3.8 on runs it, before anything is installed.
So this file and scripts/reports use only the standard library.
"""

from __future__ import annotations

import re
from typing import Mapping, NamedTuple, Sequence

from scripts import reports

# Characters that are not part of a word for make, or for the shell in its recipes. A colon is one too:
# make splits rules by it.
NOT_IN_WORDS = " \t\r\n$#%;'\"`&|<>()[]{}*?!~\\:"
DTYPES = ("float16", "bfloat16", "float32")
QUANTS = ("int8_wo", "int4_awq", "fp8", "sq")
# Secrets come from the environment or from a file, because every user of the machine can see a command line.
SECRETS = ("META_URL", "MIRROR_URL", "HF_TOKEN")
NUMBER, NUMBER_OR_EMPTY = r"[1-9][0-9]{0,8}", r"(?:[1-9][0-9]{0,8})?"
A_NUMBER = "a whole number of at least 1"
ORIGIN = r"https?://[\w.-]+(?::[0-9]+)?"


class Setting(NamedTuple):
    """One setting. pattern: of the whole value; says: the pattern in words; example: a valid value.

    default: its value if neither the command line nor the preset has it; shown: the default in the page's words, if
    they differ;
    words: the values, if there are only a few; goals: the make words that use it; empty: all that make or use rooms;
    text: what it is; holds: characters of NOT_IN_WORDS that it may hold; free: text for the environment only, never for
    a recipe; with_torch: the only value with ENGINE=torch, None if any will do.
    """

    name: str
    default: str
    pattern: str
    says: str
    example: str
    text: str
    goals: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    shown: str = ""
    holds: str = ""
    free: bool = False
    with_torch: str | None = None


def _one_of(name: str, default: str, words: Sequence[str], text: str, **more: object) -> Setting:
    """A setting with a fixed list of words; it may be empty if `words` has the empty word."""
    named = [word for word in words if word]
    says = " or ".join(filter(None, [", ".join(named[:-1]), named[-1]])) + (", or empty" if "" in words else "")
    pattern = "|".join(map(re.escape, words))
    return Setting(name, default, pattern, says, default or named[0], text, words=tuple(words), **more)  # type: ignore[arg-type]


def _number(name: str, default: str, text: str, **more: object) -> Setting:
    return Setting(name, default, NUMBER, A_NUMBER, default, text, **more)  # type: ignore[arg-type]


def _tokens(name: str, example: str, shown: str, text: str) -> Setting:
    return Setting(name, "", NUMBER_OR_EMPTY, f"{A_NUMBER}, or empty", example, text, shown=shown)


def _free(name: str, default: str, text: str, *goals: str) -> Setting:
    return Setting(name, default, r"[\s\S]*", "any text", default, text, goals, free=True)


PLANNING = ("plan", "doctor")
SERVING = ("serve", "demo", "ask", "bench", *PLANNING)
IMAGES = ("image", "size", "release", "chart")
ROOMS = ("weights", "config", "hf", "checkpoint", "engines", "verified", "model_repo", "image")

TABLE: tuple[Setting, ...] = (
    Setting("MODEL", "stories", ".+", "a preset of models/, or a folder (with a slash in it)", "stories",
            "a preset of `models/`, or a folder (with a slash in it)"),
    Setting("WEIGHTS", "", ".*", "a folder", "weights/llama-2-7b", "where the weights are", shown="the preset's"),
    Setting("SOURCE", "", ".*", "where weights come from", "hf:meta-llama/Llama-2-7b-hf",
            "where missing weights are fetched from: see `scripts/fetching/sources.py`",
            shown="the preset's", holds=":"),
    _one_of("ENGINE", "torch", ("torch", "tensorrt"), 'see "Two engines"'),
    _number("TP", "2", "tensor parallelism: ranks, each with its part of every layer"),
    _number("PP", "1", "pipeline stages, each of `TP` ranks; more than one with `ENGINE=tensorrt`", with_torch="1"),
    _one_of("DTYPE", "", ("", *DTYPES), "the type of the weights in the engines", shown="the weights' own"),
    _one_of("QUANT", "", ("", *QUANTS), "quantization by NVIDIA's tools, with `ENGINE=tensorrt`", shown="none",
            with_torch=""),
    _one_of("PAD_HEADS", "off", ("on", "off"),
            "`on`: heads of zeros if `TP` does not divide the heads; not in the oldest `TOOLCHAIN`"),
    Setting("TOOLCHAIN", "", r"(?:[0-9][\w.]*)?", "a version of docker/toolchains.json, or empty", "",
            "the TensorRT-LLM version; `torch` uses its formats",
            shown="`torch`: the oldest; `tensorrt`: the GPU decides"),
    Setting("CONTEXT", "", NUMBER_OR_EMPTY, f"{A_NUMBER}, or empty", "4096",
            "positions the model was trained on (Meta's files do not say)", shown="Llama 2: 4096"),
    _number("MAX_BATCH_SIZE", "8", "requests at once"),
    _tokens("MAX_INPUT_LEN", "2048", "half of `MAX_SEQ_LEN`", "tokens of a prompt"),
    _tokens("MAX_SEQ_LEN", "4096", "the context", "tokens of prompt and answer together"),
    _tokens("MAX_NUM_TOKENS", "8192", "8192", "tokens of one step of the engine"),
    _one_of("STREAMING", "on", ("on", "off"),
            '`off`: every request has one response, see "The served models"'),
    _one_of("KV_REUSE", "off", ("on", "off"),
            "share the KV cache of requests that begin alike; with `ENGINE=tensorrt` not on V100"),
    Setting("HOST", "127.0.0.1", r"[\w.:-]+", "an address of this machine, for instance 127.0.0.1, 0.0.0.0 or ::1",
            "127.0.0.1", "where the server listens", SERVING, holds=":"),
    _number("HTTP_PORT", "8000", "Triton's HTTP", goals=SERVING),
    _number("GRPC_PORT", "8001", "Triton's gRPC", goals=SERVING),
    _number("METRICS_PORT", "8002", "Triton's metrics", goals=SERVING),
    _number("OPENAI_PORT", "9000", "the OpenAI-compatible endpoint", goals=SERVING),
    Setting("OPENAI_WORKERS", "", r"(?:[1-9][0-9]?)?", "a whole number from 1 to 99, or empty", "2",
            "processes that answer on it (docs/endpoint.md)",
            SERVING, shown="one for every four cores, at most eight"),
    Setting("OPENAI_HOST", "", r"[\w.:-]*", "an address of this machine, for instance 127.0.0.1, 0.0.0.0 or ::1, or empty",
            "127.0.0.1", "where the endpoint listens, apart from Triton", SERVING, holds=":", shown="`HOST`"),
    Setting("MODEL_ALIASES", "", r"(?:[\w./:-]+(?:,[\w./:-]+)*)?", "names with commas between them, or empty", "llama-2,gpt-3.5-turbo",
            "more names of the model for the endpoint's clients", SERVING, holds=":", shown="none"),
    Setting("CORS_ORIGINS", "", rf"(?:any|{ORIGIN}(?:,{ORIGIN})*)?", "origins with commas between them, or any, or empty",
            "https://chat.example", "origins whose pages may ask the endpoint, or `any`", SERVING, holds=":", shown="none"),
    Setting("DRAIN_SECONDS", "20", NUMBER, A_NUMBER, "20", "how long running requests may take when the server ends", SERVING),
    Setting("LAME_DUCK_SECONDS", "0", r"0|[1-9][0-9]{0,3}", "a whole number, or 0", "5",
            "before that: how long new requests are still served while `/health` says 503", SERVING),
    _one_of("METRICS", "on", ("on", "off"), "Prometheus' page `/metrics` on the endpoint's port", goals=SERVING),
    _one_of("TRACES", "off", ("on", "off"), "`on`: a trace of each request for OpenTelemetry (docs/operations.md)", goals=SERVING),
    _one_of("LOG", "text", ("text", "json"), "`json`: also a line for each request to the endpoint", goals=SERVING),
    Setting("CHAT_TEMPLATE", "", ".*", "a Jinja file that is there, or empty for the model's own template", "",
            "a Jinja file", shown="the model's own, or the preset's"),
    Setting("API_KEY_FILE", "", ".*", "a file that is there, with one API key per line, or empty", "",
            "keys of its clients, one per line (scripts/openai/README.md); or `BAKE_API_KEY`", SERVING,
            shown="no key is needed"),
    _free("PROMPT", "Once upon a time", "what `ask` asks", "ask"),
    _number("MAX_TOKENS", "48", "how long the answer may be", goals=("ask", "demo")),
    Setting("PYTHON", "", ".*", "an interpreter that runs", "",
            "an interpreter that has the packages; no `.venv` is made", shown="`.venv/bin/python`"),
    Setting("ASSUME_GPU", "", r"(?:(?:[1-9][0-9]? *x *)?[\w.-]+)?",
            "the GPUs to assume, for instance 4x V100-SXM2-16GB, only in make plan, make doctor and make -n: nothing "
            "is built for it",
            "4x V100-SXM2-16GB", "GPUs to assume in `plan`, `doctor` and `make -n`, for instance `4x V100-SXM2-16GB`", holds=" "),
    Setting("REHEARSAL", "", r"(?:[1-9][0-9]?x [\w.-]+)?",
            "the GPUs to stand in for, for instance 2x A100-80GB (docker/README.md)", "2x A100-80GB",
            "GPUs to rehearse `ENGINE=tensorrt` with, on any machine", holds=" ", with_torch=""),
    Setting("ROOM", "", "|".join(["", ".*/.*", *ROOMS]), f"{', '.join(ROOMS)}, or a folder", "checkpoint",
            "a room by its name, or a folder", ("fsck",), ROOMS, "all that are made"),
    _one_of("JSON", "", ("", "1"), "`1`: answer in JSON", goals=("plan", "doctor", "fsck", "size", "soak")),
    Setting("BASE_IMAGE", "", r"(?:[\w.@/:-]+)?", "the name of an image, or empty", "", "another base for the image", IMAGES,
            shown="NVIDIA's, or Debian's packages", holds=":"),
    _one_of("TARGET", "cpu", ("cpu", "cuda"), "which PyTorch is in the image of `ENGINE=torch`", goals=IMAGES),
    _one_of("BUILDER", "", ("", "docker", "buildah"), "what builds the image", goals=IMAGES,
            shown="docker if it answers"),
    _one_of("NO_CACHE", "", ("", "1"), "`1`: build the image from nothing", goals=IMAGES),
    Setting("LICENSE", "", r"(?:[A-Za-z0-9.+-]+)?", "an SPDX name or llama2, or empty", "Apache-2.0", "the model's licence", IMAGES,
            shown="the preset's"),
    Setting("VERSION", "", r"(?:[A-Za-z0-9][\w.+-]*)?", "x.y.z", "1.0.0", "of the release", ("release", "push", "chart")),
    _one_of("INFERRED", "", ("", "accept"), "`accept`: tables without a primary source may be used", goals=("release",)),
    _free("IMAGE", "", "an image, or a file of `dist/`", "verify-image", "push", "chart"),
    _free("NODE", "", "one host of the cluster, for instance `8x H100-80GB`", "chart"),
    _free("KEY", "", "a file with the key to sign with", "release"),
    _free("TESTS", "", "which tests to run", "test", "test-versions", "test-clients", "test-load", "test-image",
          "test-long"),
    Setting("BENCH", "", r"[\w ./:,=-]*", "options of the benchmark", "", "options of a benchmark", ("bench",), holds=" :"),
    Setting("POINTS", "", r"[0-9: ]*", "loads as input:output:streams", "512:128:8", "loads to measure", ("bench",), holds=" :"),
    Setting("BASELINE", "", r"[\w./-]*", "the file of an older run", "", "an older run to compare with", ("bench",)),
    Setting("WITH", "", r"[\w ./-]*", "files of runs", "", "runs of other `TP` for the same page", ("bench",), holds=" "),
    Setting("SECONDS", "", NUMBER_OR_EMPTY, f"{A_NUMBER}, or empty", "60", "how long to soak", ("soak",), shown="1800"),
    _one_of("PEERS", "", ("", "on"), "`on`: measure other servers too", goals=("bench",)),
    Setting("VLLM_PYTHON", "", r"[\w./-]*", "an interpreter that has vLLM", "",
            "an interpreter that has vLLM, in its own environment, for `PEERS=on`", ("bench",)),
    _one_of("FORM", "", ("", "gguf"), "in a preset: `gguf` if its weights have that form", shown="found in the folder"),
)  # fmt: skip
NAMES = tuple(setting.name for setting in TABLE)
BY_NAME: dict[str, Setting] = {setting.name: setting for setting in TABLE}
# Triton's three ports and the endpoint's, by default. Files that no Python reads repeat them (docker/, the chart,
# docs): tests/test_settings.py compares them.
PORTS = {name: int(BY_NAME[name].default) for name in NAMES if name.endswith("_PORT")}
# Settings that are also options with the same name; LOG's option is not --log, which names a file
OPERATING = (
    "OPENAI_HOST", "DRAIN_SECONDS", "LAME_DUCK_SECONDS", "METRICS", "TRACES", "LOG", "MODEL_ALIASES", "CORS_ORIGINS",
)  # fmt: skip


def flag(name: str) -> str:
    """The option of a setting."""
    return "--log-form" if name == "LOG" else "--" + name.lower().replace("_", "-")


# Paths have their own report if make could not take their characters.
PATHS = ("MODEL", "WEIGHTS", "SOURCE", "PYTHON", "CHAT_TEMPLATE", "API_KEY_FILE", "ROOM")
MODELS_OF_THE_HUB = re.compile(r"[\w.-]+/[\w.-]+")


def fits(setting: Setting, value: str) -> bool:
    """Whether the setting allows a value, as far as the value alone can say."""
    if setting.free:
        return True
    return not characters(setting, value) and re.fullmatch(setting.pattern, value) is not None


def characters(setting: Setting, value: str) -> list[str]:
    """The characters of a value that make and the shell would not take as part of a word."""
    return [] if setting.free else sorted(set(value) & (set(NOT_IN_WORDS) - set(setting.holds)))


def clash(name: str, values: Mapping[str, str]) -> str:
    """What else a valid value needs, in words; empty if nothing is missing."""
    setting, value = BY_NAME[name], values[name]
    if setting.with_torch is not None and values["ENGINE"] != "tensorrt" and value != setting.with_torch:
        return f"{setting.with_torch or 'empty'} with ENGINE=torch; {setting.says} with ENGINE=tensorrt"
    if name == "PAD_HEADS" and value == "on" and values["QUANT"]:
        return "off with QUANT"
    return ""


def wrong(values: Mapping[str, str]) -> list[str]:
    """The settings with impossible values, in the order of the table. Files and folders are not checked."""
    return [name for name in NAMES if not fits(BY_NAME[name], values[name]) or clash(name, values)]


def nearest(word: str, known: Sequence[str]) -> str:
    """The known word that looks most like a mistyped one."""
    import difflib

    return (difflib.get_close_matches(word, known, 1, 0) or [known[0]])[0]


def repair(name: str, values: Mapping[str, str]) -> dict[str, str]:
    """The settings to type instead, as near as possible to what the user typed."""
    setting, value = BY_NAME[name], values[name]
    fixed = value
    if not fits(setting, value):
        fixed = (
            nearest(value.lower(), [word for word in setting.words if word])
            if setting.words and value
            else setting.example
        )
    if name == "PAD_HEADS" and values["QUANT"]:
        return {name: "off"}
    needs_tensorrt = setting.with_torch is not None and values["ENGINE"] != "tensorrt" and fixed != setting.with_torch
    return {name: fixed, **({"ENGINE": "tensorrt"} if needs_tensorrt else {})}


def problem(
    names: Sequence[str], values: Mapping[str, str], presets: Sequence[str], toolchains: Sequence[str], goal: str = ""
) -> reports.Problem:
    """Why make refuses these settings: all of them in one report. values: name -> value, of every setting."""
    problems = [_problem(name, values, presets, toolchains, goal) for name in names]
    alone = [
        n
        for n, name in enumerate(names)
        if name in SECRETS or (name in PATHS and not fits(BY_NAME[name], values[name]))
    ]
    if alone or len(problems) == 1:  # these reports advise more than another value
        return problems[alone[0] if alone else 0]
    fixed: dict[str, object] = {}
    for name in names:
        if name not in BY_NAME:
            fixed[name] = None
        elif not _about_files(name, values):
            fixed.update(repair(name, values))
    return reports.settings.several_wrong(problems, reports.make(_goal(names[0], goal), **fixed))


def _goal(name: str, goal: str) -> str:
    """The make word in the advice: the user's own if it is known, else one that uses the setting."""
    return goal or (BY_NAME[name].goals or ("serve",))[0] if name in BY_NAME else goal or "serve"


def _about_files(name: str, values: Mapping[str, str]) -> bool:
    return name in PATHS and fits(BY_NAME[name], values[name])


def _problem(
    name: str, values: Mapping[str, str], presets: Sequence[str], toolchains: Sequence[str], goal: str
) -> reports.Problem:
    typed = _goal(name, goal)
    if name in SECRETS:
        return reports.fetching.secret_typed(name)
    if name not in BY_NAME:
        near = nearest(name.upper(), NAMES)
        command = reports.make(typed, **{name: None, near: values.get(name, "")})
        return reports.settings.no_such_setting(name, NAMES, near, command)
    setting, value = BY_NAME[name], values[name]
    if name == "SOURCE" and "://" in value and ("?" in value or "@" in value):
        return reports.fetching.secret_in_source()
    if name in PATHS and characters(setting, value):
        return reports.settings.path_not_for_make(name, value, characters(setting, value), typed)
    if name == "MODEL" and MODELS_OF_THE_HUB.fullmatch(value):
        return reports.settings.model_of_the_hub(value, typed)
    if name == "MODEL" and not value:
        return reports.settings.bad_setting(name, value, setting.says, reports.make(typed, MODEL=setting.default))
    if name == "MODEL":
        return reports.settings.no_such_model(value, presets, nearest(value.lower(), presets), typed)
    if name == "WEIGHTS":
        if "/" in values["MODEL"] and value != values["MODEL"]:
            return reports.settings.weights_named_twice(values["MODEL"], value)
        if value == values["MODEL"] and MODELS_OF_THE_HUB.fullmatch(value) and not values["SOURCE"]:
            return reports.settings.model_of_the_hub(value, typed)
        return reports.settings.weights_not_there(
            "MODEL" if value == values["MODEL"] else "WEIGHTS", value, values["SOURCE"]
        )
    if name == "PYTHON":
        return reports.packages.interpreter_missing(value)
    if name == "TOOLCHAIN":
        near = nearest(value, toolchains)
        return reports.settings.bad_setting(
            name, value, "one of " + ", ".join(toolchains), reports.make(typed, TOOLCHAIN=near)
        )
    if name == "API_KEY_FILE" and fits(setting, value):
        return reports.serving.no_api_key(value, "there is no such file")
    if name == "CHAT_TEMPLATE" and fits(setting, value):
        return reports.settings.bad_setting(name, value, setting.says, reports.make(typed, CHAT_TEMPLATE=""))
    if name == "ASSUME_GPU":  # as it is, if only the word is wrong
        return reports.settings.bad_setting(name, value, setting.says, reports.make("plan", **repair(name, values)))
    allowed = clash(name, values) if fits(setting, value) else setting.says
    return reports.settings.bad_setting(
        name, value, allowed or setting.says, reports.make(typed, **repair(name, values))
    )


def table_page() -> str:
    """The table of docs/settings.md, one setting per row; `make help` prints it too."""
    rows = ["| setting | default | what it is |", "|---|---|---|"]
    for setting in TABLE:
        default = setting.shown or (f"`{setting.default}`" if setting.default else "")
        goals = "" if setting.goals in ((), SERVING) else ", ".join(f"`{goal}`" for goal in setting.goals) + ": "
        words = [f"`{word}`" for word in setting.words if word and word != setting.default]
        words = [word for word in words if word not in setting.text and setting.name not in PATHS]
        rows.append(f"| `{setting.name}` | {default} | {goals}{setting.text}{': ' if words else ''}{' '.join(words)} |")
    return "\n".join(row.replace("|  |", "| |") for row in rows) + "\n"


# Values that tests give to every setting; `wrong_values` keeps those that a setting must refuse.
SLIPS = (
    "", "0", "-1", "07", "1.5", "2 3", "x", "on off", "false", "%", ".*", "a b", "a;b", "a'b", 'a"b', "a#b", "x&y", "$(shell touch pwned)",
    "`touch pwned`", "$HOME", "../..", "a:b", "9.9.9", "1000000000",
)  # fmt: skip


def wrong_values(setting: Setting) -> list[str]:
    """Values that a setting must refuse, derived from what the table allows."""
    return [value for value in SLIPS if not fits(setting, value)]
