"""From settings to make's variables: where rooms lie, their questions, what is installed first, how a script runs.

Settings are values here. The only file that this writes is build/gpu.json (scripts/making/toolchain.py).
See docs/design.md.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Mapping, Sequence

from scripts import reports, settings
from scripts.making import choice, container, ingredients, seen, toolchain

ROOT = choice.ROOT
VENV = ".venv"
# a rehearsal's stand-ins for docker and nvidia-smi
REHEARSAL = ROOT / "docker" / "rehearsal" / "host"
# sources for which the package of requirements/fetch.txt is needed
CLOUDS = ("hf:", "s3:", "gs:", "az:")
VARIANT_ROOMS = ("checkpoint", "engines", "verified", "model_repo", "image")
# words that make the room image, which asks for the commit
GIT_WORDS = {*settings.IMAGES}
PERF_NEEDS_GLIBC = (2, 38)
# as in the Makefile; an accepted setting holds no brace
LINE_BREAK = "{newline}"


# --- core: values in, values out --------------------------------------------------------------------------------------


def name_of(model: str) -> str:
    """The name of a model's rooms: the preset's name; for a folder, its last part and a sum of the whole path."""
    if "/" not in model:
        return model
    path = os.path.realpath(model)
    last = re.sub(rb"[^A-Za-z0-9._+@=,\x80-\xff-]", b"_", os.fsencode(os.path.basename(path)))
    return f"{os.fsdecode(last)}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"


def variant_of(values: Mapping[str, str]) -> str:
    """The folder of the rooms that depend on the split, the type, the engine and the toolchain; below the model's."""
    parts = [f"tp{values['TP']}"]
    parts += ["padded"] if values["PAD_HEADS"] == "on" else []
    parts += [f"pp{values['PP']}"] if values["PP"] != "1" else []
    parts += [values["DTYPE"] or "source", *([values["QUANT"]] if values["QUANT"] else [])]
    rehearsal = "rehearsal-" if values["REHEARSAL"] else ""
    return f"{rehearsal}{values['ENGINE']}-{values['TOOLCHAIN']}-{'-'.join(parts)}"


def ground_of(values: Mapping[str, str]) -> str:
    """The folder of the rooms below an image (base, wheels), which are made once for all models."""
    kind = values["TOOLCHAIN"] if values["ENGINE"] == "tensorrt" else values["TARGET"]
    base = values["BASE_IMAGE"]
    return f"build/ground-{values['ENGINE']}-{kind}" + (
        f"-{hashlib.sha256(base.encode()).hexdigest()[:8]}" if base else ""
    )


def locks_of(values: Mapping[str, str]) -> list[str]:
    """The lock files of an image's Python packages; NVIDIA's image has the others already."""
    if values["ENGINE"] == "tensorrt":
        return ["image", "openai"]
    return ["image", "openai", "run", "torch", *(["torch-cuda"] if values["TARGET"] == "cuda" else [])]


def arguments(values: Mapping[str, str], places: Mapping[str, str], revision: str) -> dict[str, str]:
    """room -> the options of its script. They may hold a path of this machine, because they are the question,
    not the answer."""
    tensorrt, quant, version = values["ENGINE"] == "tensorrt", values["QUANT"], values["TOOLCHAIN"]
    config, hf, variant, ground = (places[name] for name in ("CONFIG", "HF", "VARIANT", "GROUND"))
    about_model = f"--max-position-embeddings={values['CONTEXT']}"
    timing_cache = f"build/{'rehearsal-' if values['REHEARSAL'] else ''}timing-cache"
    asked = {
        "config": [about_model],
        "hf": [about_model],
        "checkpoint": [
            f"--model {hf if quant else config} --pad-heads {values['PAD_HEADS']} --tp-size {values['TP']} --pp-size "
            f"{values['PP']}",
            f"--dtype={values['DTYPE']} --trtllm-version {version} --engine {values['ENGINE']}",
            f"--quant {quant} --examples build/TensorRT-LLM-{version}" if quant else "",
        ],
        "engines": [
            f"--checkpoint {variant}/checkpoint --engine {values['ENGINE']} --trtllm-version {version}",
            f"--max-batch-size={values['MAX_BATCH_SIZE']} --max-input-len={values['MAX_INPUT_LEN']}",
            f"--max-seq-len={values['MAX_SEQ_LEN']} --max-num-tokens={values['MAX_NUM_TOKENS']}",
            f"--timing-cache {timing_cache}" if tensorrt else "",
        ],
        "verified": [f"--engines {variant}/engines --hf {hf}"],
        "model_repo": [
            f"--engines {variant}/engines --config {config} --trtllm-version {version} --streaming "
            f"{values['STREAMING']}",
            f"--kv-reuse {values['KV_REUSE']} --name {os.path.basename(values['MODEL'].rstrip('/'))}",
            f"--chat-template={values['CHAT_TEMPLATE']}",
        ],
        "base": [
            f"--builder={values['BUILDER']}",
            f"--trtllm-version {version}" + ("" if values["BASE_IMAGE"] else " --by-table") if tensorrt else "",
        ],
        "wheels": [
            f"--base {ground}/base --target {values['TARGET']}",
            *(f"--lock {lock}" for lock in locks_of(values)),
        ],
        "image": [
            f"--root {variant} --base {ground}/base --wheels {ground}/wheels --weights '{values['WEIGHTS']}'",
            f"--model {places['NAME']} --license={values['LICENSE']} --revision={revision} "
            f"--builder={values['BUILDER']}",
        ],
    }
    return {room: " ".join(filter(None, words)) for room, words in asked.items()}


def to_check(values: Mapping[str, str], places: Mapping[str, str]) -> list[str]:
    """The folders that `make fsck` reads: ROOM by its name or as a folder, else all that are made."""
    rooms = {"config": places["CONFIG"], "hf": places["HF"], "weights": values["WEIGHTS"]}
    rooms.update({room: f"{places['VARIANT']}/{room}" for room in VARIANT_ROOMS})
    asked = values["ROOM"]
    if asked:
        return [asked if "/" in asked else rooms.get(asked, f"{places['VARIANT']}/{asked}")]
    made = [folder for name, folder in rooms.items() if name != "weights" and Path(folder, "manifest.json").is_file()]
    weights = Path(values["WEIGHTS"])
    return made + [str(weights)] * ((weights / "manifest.json").is_file() or any(weights.glob("*.pth")))


def packages(values: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """The lock files whose packages (rooms, fetching weights) need."""
    gguf = values["FORM"] == "gguf" or any(Path(values["WEIGHTS"]).glob("*.gguf"))
    fetch = values["SOURCE"].startswith(CLOUDS)
    return ["run.txt", *(["gguf.txt"] if gguf else [])], ["run.txt", *(["fetch.txt"] if fetch else [])]


# --- shell ------------------------------------------------------------------------------------------------------------


def revision_here() -> str:
    """The commit that an image is made from, and whether files differ from it; empty outside of git."""

    def git(*words: str) -> str:
        try:
            done = subprocess.run(
                ["git", *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False, text=True
            )
        except OSError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")


def fetches_without_packages(python: str) -> bool:
    """Whether weights come with the host's own python3: there is no .venv yet, and urllib3 is there."""
    ask = ["python3", "-c", "import sys, urllib3; sys.exit(sys.version_info < (3, 8))"]
    return (
        not os.access(python, os.X_OK) and subprocess.run(ask, stderr=subprocess.DEVNULL, check=False).returncode == 0
    )


def packages_sum() -> str:
    """The name of the pinned packages in a room's question."""
    locks = b"".join(Path("requirements", name).read_bytes() for name in ("run.txt", "torch.txt"))
    return hashlib.sha256(locks).hexdigest()[:12]


def new_glibc() -> bool:
    """Whether the packages of requirements/perf.txt run here."""
    found = re.search(r"(\d+)\.(\d+)", os.confstr("CS_GNU_LIBC_VERSION") or "")
    return bool(found) and (int(found[1]), int(found[2])) >= PERF_NEEDS_GLIBC  # type: ignore[index]


def places_of(values: Mapping[str, str]) -> dict[str, str]:
    """Where rooms lie."""
    name = name_of(values["MODEL"])
    return {
        "NAME": name,
        "CONFIG": f"build/{name}/config",
        "HF": f"build/{name}/hf",
        "VARIANT": f"build/{name}/{variant_of(values)}",
        "GROUND": ground_of(values),
    }


def variables(typed: choice.Typed, values: Mapping[str, str], refused: Sequence[str]) -> dict[str, str]:
    """Everything that the Makefile reads, except the settings themselves."""
    goals = set(typed.goals)
    places = places_of(values)
    tensorrt = values["ENGINE"] == "tensorrt"
    locks = "" if values["PYTHON"] else f"{VENV}/locks/"
    python = values["PYTHON"] or f"{VENV}/bin/python"
    rooms_need, fetching_needs = packages(values)
    fetch = bool(values["SOURCE"]) and not os.path.isdir(values["WEIGHTS"])
    ports = (
        f"--http-port {values['HTTP_PORT']} --grpc-port {values['GRPC_PORT']} --metrics-port {values['METRICS_PORT']}"
    )
    keys = f" --api-key-file {values['API_KEY_FILE']}" if values["API_KEY_FILE"] else ""
    workers = f" --openai-workers {values['OPENAI_WORKERS']}" if values["OPENAI_WORKERS"] else ""
    operating = {
        name: f" {settings.flag(name)} {values[name]}"
        for name in settings.OPERATING
        if values[name] != settings.BY_NAME[name].default
    }
    more = "".join(operating.values())
    inside = "".join(words for name, words in operating.items() if name != "OPENAI_HOST")
    endpoint = f"--openai-port {values['OPENAI_PORT']}{workers}{keys}"
    host = f"--host {values['HOST']} {ports}"
    own_hf = values["WEIGHTS"] if Path(values["WEIGHTS"], "config.json").is_file() else ""
    found = {
        **places,
        "PY": python,
        "HAS": locks,
        "THINKS": python if os.access(python, os.X_OK) or values["PYTHON"] else "python3",
        "FETCH": "weights" if fetch else "",
        "SEEN": "$(shell python3 -ESB -m scripts.making.seen '$(WEIGHTS)')" if fetch else seen.seen(values["WEIGHTS"]),
        "FETCHING_NEEDS": " ".join(locks + name for name in fetching_needs) if locks else "",
        "NEEDED": " ".join(locks + name for name in rooms_need) if locks else "",
        "MADE_IN": f"lock={packages_sum()}",
        "NVIDIA": "",
        "LACKS": "",
        "SERVING": "",
        "ENDPOINT_NEEDS": f"{locks}openai.txt" if locks and (not tensorrt or values["REHEARSAL"]) else "",
        "FETCH_PY": python,
        "READ_WEIGHTS": "config hf" if values["QUANT"] else "config hf checkpoint",
        "PORTS": ports,
        "ENDPOINT": endpoint,
        "ADDRESS": host,
        "LISTEN": f"{host} {endpoint}{more}",
        "DEMO_ON": host,
        "BASE": values["BASE_IMAGE"],
        "IMAGE_LOCKS": " ".join(locks_of(values)),
        "TO_CHECK": " ".join(to_check(values, places)),
        "HF_FOLDER": own_hf or places["HF"],
        "HF_ROOM": "" if own_hf else f"{places['HF']}/manifest.json",
        "PERF": f"{locks}perf.txt" if locks and "bench" in goals and new_glibc() else "",
        "REFUSED": " ".join(refused),
        **{f"in_{job}": python for job in container.JOBS},
    }
    found["in_serve"] = f"exec {python}"
    if tensorrt and values["TOOLCHAIN"]:
        row = toolchain.rows()[values["TOOLCHAIN"]]
        box = container.container_of(values["TOOLCHAIN"], row, bool(values["REHEARSAL"]))
        found.update(
            NEEDED=box.iid,
            SERVING=box.serving,
            MADE_IN=box.made_in,
            NVIDIA=box.image,
            LACKS=box.lacks,
            DEMO_ON=f"--host 127.0.0.1 {ports}",
            # OPENAI_HOST is an address of this host, where docker publishes the port
            LISTEN=f"--host 0.0.0.0 --shown-host {values['HOST']} {ports} {endpoint}{inside}",
            BASE=values["BASE_IMAGE"] or (f"$(file <{box.iid})" if box.iid else box.image),
            **{f"in_{job}": words for job, words in container.runs(box, values).items()},
        )
    if (
        tensorrt
        and fetching_needs == ["run.txt"]
        and (fetch or "weights" in goals)
        and fetches_without_packages(python)
    ):
        found.update(FETCH_PY="python3", FETCHING_NEEDS="")
    asked = arguments(values, places, revision_here() if goals & GIT_WORDS else "")
    found.update({f"{room}_ARGS": words for room, words in asked.items()})
    rooms = {
        "config": places["CONFIG"],
        "hf": places["HF"],
        "base": f"{places['GROUND']}/base",
        "wheels": f"{places['GROUND']}/wheels",
    }
    rooms.update({room: f"{places['VARIANT']}/{room}" for room in VARIANT_ROOMS})
    found["STALE"] = " ".join(room for room, folder in rooms.items() if ingredients.stale(Path(folder)))
    return found


def rehearsal_path(values: Mapping[str, str]) -> str:
    """PATH, with a rehearsal's stand-ins first."""
    path = os.environ.get("PATH", os.defpath)
    return f"{REHEARSAL}:{path}" if values["REHEARSAL"] else path


def answer(typed: choice.Typed, words: Sequence[str]) -> list[str]:
    """The lines for make; a Problem if the user typed something wrong."""
    meant = [choice.nearest_word(goal, words) for goal in typed.goals]
    os.environ["BAKE_SETTINGS"] = "\n".join(
        f"{name}={value}" for name, value in typed.settings.items() if told(name, meant)
    )
    os.environ["BAKE_GOAL"] = typed.goal
    for goal, near in zip(typed.goals, meant):
        if goal != near and goal.upper() in settings.NAMES:
            after = typed.goals[typed.goals.index(goal) + 1 :]
            value = after[0] if after and after[0] not in words else settings.BY_NAME[goal.upper()].example
            wanted = next((word for word in typed.goals if word in words), "serve")
            raise reports.settings.setting_without_equals(goal, value, wanted)
        if goal != near:
            raise reports.settings.no_such_word(goal, sorted(words), near)
    values = choice.values_of(typed.settings)
    refused = choice.refused(typed, values)
    looking = bool(typed.goals) and set(typed.goals) <= choice.PLANNING
    if refused and not looking:
        raise settings.problem(refused, {**typed.settings, **values}, choice.presets(), choice.toolchains(), typed.goal)
    said = ""
    if not refused or refused == ["WEIGHTS"]:
        if choice.SPLIT & set(typed.goals):
            choice.check_split(values, typed.goal)
        if not values["TOOLCHAIN"] and values["ENGINE"] != "tensorrt":
            values["TOOLCHAIN"] = choice.toolchains()[0]
        elif not values["TOOLCHAIN"] and set(typed.goals) - choice.WITHOUT_TOOLCHAIN:
            os.environ["REHEARSAL_GPUS"] = values["REHEARSAL"]
            values["TOOLCHAIN"], said = toolchain.choose(
                values["ASSUME_GPU"], values["REHEARSAL"], rehearsal_path(values), typed.asked
            )
    lines = []
    for setting in settings.TABLE:
        name = setting.name
        if not setting.free:
            lines.append(f"override {name} := {for_make(values[name])}")
        elif name in typed.settings:
            lines.append(f"override {name} := $(value {name})")
        else:
            lines.append(f"{name} := {setting.default}")
    known = {name: values[name] for name in typed.settings if told(name, typed.goals) and name not in refused}
    lines.append(
        "export BAKE_SETTINGS := " + "$(NEWLINE)".join(f"{name}={for_make(value)}" for name, value in known.items())
    )
    lines.append(f"export BAKE_GOAL := {typed.goal}")
    if values["REHEARSAL"] and not refused:
        lines += [
            f"export PATH := {for_make(str(REHEARSAL))}:$(PATH)",
            f"export REHEARSAL_PYTHON := {for_make(os.path.abspath(values['PYTHON'] or VENV + '/bin/python'))}",
            f"export REHEARSAL_GPUS := {values['REHEARSAL']}",
            f"export REHEARSAL_TRTLLM := {values['TOOLCHAIN']}",
        ]
    # plan and doctor show a refused choice as it was typed; it has no rooms
    right = {
        **values,
        **{name: settings.BY_NAME[name].default for name in refused if name in values and name != "WEIGHTS"},
    }
    found = variables(typed, right, refused)
    if looking:
        chosen = {
            **{name: value for name, value in values.items() if not settings.BY_NAME[name].free},
            "INTERPRETER": found["PY"],
        }
        chosen.update({name: found[name] for name in ("CONFIG", "HF", "VARIANT")})
        lines.append(
            "export CHOSEN := " + "$(NEWLINE)".join(f"{name}={for_make(value)}" for name, value in chosen.items())
        )
    lines += [f"{name} = {value}" for name, value in found.items()]
    return [*([f"$(info {for_make(said)})"] if said else []), *lines]


def told(name: str, goals: Sequence[str]) -> bool:
    """Whether a report's command repeats a setting of the user: not free text, and not settings of other words."""
    setting = settings.BY_NAME.get(name)
    if setting is None or setting.free or name == "JSON":
        return False
    return not setting.goals or bool(set(goals) & set(setting.goals))


def for_make(text: str) -> str:
    """Text, escaped for a makefile."""
    return text.replace("$", "$$").replace("#", "\\#").replace(LINE_BREAK, "")


def typed_of(arguments: Sequence[str]) -> tuple[choice.Typed, list[str]]:
    """The arguments from the Makefile, with the words that it knows."""
    flags = [word for word in arguments if word in ("--asked", "--below")]
    words, goals, *pairs = [word for word in arguments if word not in flags]
    split = [pair.partition("=") for pair in pairs]
    given = {name: value.strip() for name, _, value in split}
    return choice.Typed(goals.split(), given, "--asked" in flags, "--below" in flags), words.split()


def main(arguments: Sequence[str]) -> None:
    """Print the answer in one line, or a report and `$(error ...)`, which ends make."""
    typed, words = typed_of(arguments)
    try:
        print(LINE_BREAK.join(answer(typed, words)))
    except reports.Problem as problem:
        as_json = typed.settings.get("JSON") == "1"
        print(problem.as_json() if as_json else f"\n{problem.report()}\n", file=sys.stderr)
        print("$(error Nothing was made)")
