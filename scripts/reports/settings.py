"""Reports about what was typed: settings, models, presets."""

from __future__ import annotations

import os
import shlex
from typing import Sequence

from scripts.reports.problem import PathLike, Problem, make


def bad_setting(name: str, value: object, allowed: str, command: str) -> Problem:
    return Problem(
        f"{name} cannot be {value if str(value) else 'empty'}",
        "Makefile",
        f"{name} is {str(value)!r}; it must be {allowed}.",
        "For instance:",
        command,
    )


def several_wrong(problems: Sequence[Problem], command: str) -> Problem:
    """Several wrong settings: what is wrong with each, and the command with all of them corrected."""
    return Problem(
        f"{len(problems)} settings have impossible values",
        "Makefile",
        "\n\n".join(problem.seen.split("\n\n")[0] for problem in problems),
        "For instance:",
        command,
    )


def no_such_word(word: str, words: Sequence[str], near: str) -> Problem:
    return Problem(
        f"make does not know {word}",
        "Makefile",
        f"{word!r} is not a target of this Makefile; the targets are: {', '.join(words)}.",
        "The nearest one:",
        make(near),
    )


def setting_without_equals(word: str, value: str, goal: str) -> Problem:
    """word: a setting's name that was typed where make expects a target, as in `make serve TP 2`."""
    name = word.lstrip("-").replace("-", "_").upper()
    return Problem(
        f"{name} is a setting",
        "Makefile",
        f"{word!r} was typed as a target. A setting is typed as NAME=value.",
        "For instance:",
        make(goal, **{name: value}),
    )


def model_of_the_hub(model: str, goal: str) -> Problem:
    """MODEL looks like a name on the hub: no folder has that name, but the weights can be fetched."""
    folder = f"weights/{model.partition('/')[2]}"
    return Problem(
        "no such folder",
        model,
        f"MODEL is {model}, but there is no such folder. It looks like the name of a model on the Hugging Face hub. "
        f"Its weights can be fetched into {folder}.",
        "Fetch them, and go on:",
        make(goal, MODEL=folder, SOURCE=f"hf:{model}"),
    )


def no_preset(path: PathLike, line: str) -> Problem:
    return Problem(
        "a preset cannot be read",
        path,
        "A line of a preset is `NAME = value`, a comment, or `include models/families/FILE.mk`. This line is none of "
        f"these: {line!r}.",
        "See the bundled one:",
        "cat models/stories.mk",
    )


def path_not_for_make(name: str, value: str, characters: Sequence[str], goal: str = "serve") -> Problem:
    listed = " ".join(repr(character) for character in characters)
    return Problem(
        f"{name} is a path that make cannot take",
        value,
        f"The path holds {listed}. make and the shell treat these characters specially: a path cannot have a space, "
        f"a quote or any of $ # % : ; & | < > ( ) [ ] {{ }} * ? ! ~ \\ in it.",
        "Make a link with a plain name and use that:",
        f"ln -sfn {shlex.quote(os.path.expanduser(value))} /tmp/linked && {make(goal, **{name: '/tmp/linked'})}",
    )


def no_such_setting(name: str, settings: Sequence[str], near: str, command: str) -> Problem:
    return Problem(
        f"no setting named {name}",
        "Makefile",
        f"{name} is not a setting; the settings are: {', '.join(settings)}.",
        f"The nearest one is {near}:",
        command,
    )


def weights_named_twice(model: str, weights: str) -> Problem:
    return Problem(
        "two places for the weights",
        "Makefile",
        f"MODEL is the folder {model}, WEIGHTS is {weights}. WEIGHTS is for presets only, so make cannot tell which "
        "folder you mean.",
        "Give one of them:",
        f"make serve MODEL={weights if '/' in weights else './' + weights}",
    )


def weights_not_there(name: str, folder: PathLike, source: str = "") -> Problem:
    seen = (
        f"{name} is {folder}; there is no such folder. It should hold a model in Meta's form (params.json, "
        "consolidated.NN.pth), in Hugging Face's form (config.json, .safetensors or .bin), or one .gguf file."
    )
    if source:
        return Problem(
            "no such folder",
            folder,
            seen,
            f"Put the model or a link to it there, or fetch it from {source}:",
            make("weights"),
        )
    return Problem(
        "no such folder",
        folder,
        seen,
        "Put the model or a link to it there, or give its folder:",
        make("serve", **{name: "/path/to/folder"}),
    )


def no_such_model(model: str, presets: Sequence[str], near: str, goal: str = "serve") -> Problem:
    return Problem(
        f"no model named {model}",
        "models/",
        f"MODEL is {model!r}; the presets are: {', '.join(presets)}.\n\n"
        "To name a folder of weights, use a path with a slash in it.",
        "The nearest one:",
        make(goal, MODEL=near),
    )
