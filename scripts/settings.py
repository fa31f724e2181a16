"""What make cannot take as a setting: says which one, and what it may be. Run by make when it sees such a setting."""

import os
from pathlib import Path

from scripts import errors

# Characters that a makefile, or the shell in its recipes, would not take as part of a path.
NOT_IN_PATHS = " \t$#%:;'\"`"


def check(
    model: str, weights: str, engine: str, dtype: str, toolchain: str, presets: list[str], toolchains: list[str]
) -> None:
    """Raise the Problem of the first setting that cannot be right."""
    for name, value in (("MODEL", model), ("WEIGHTS", weights)):
        if bad := sorted({character for character in value if character in NOT_IN_PATHS}):
            raise errors.path_not_for_make(name, value, bad)
    if "/" not in model and model not in presets:
        raise errors.no_such_model(model, presets)
    if engine not in ("torch", "tensorrt"):
        raise errors.bad_setting("ENGINE", engine, "torch or tensorrt", errors.make("serve", ENGINE="torch"))
    if dtype not in ("", "float16", "bfloat16", "float32"):
        raise errors.bad_setting("DTYPE", dtype, "float16, bfloat16 or float32", errors.make("serve", DTYPE="float16"))
    if toolchain not in toolchains:
        known = ", ".join(toolchains)
        raise errors.bad_setting(
            "TOOLCHAIN", toolchain, f"one of {known}", errors.make("serve", TOOLCHAIN=toolchains[0])
        )


def main() -> None:
    import json

    root = Path(__file__).parent.parent
    given = {name.lower(): os.environ[name].strip() for name in ("MODEL", "WEIGHTS", "ENGINE", "DTYPE", "TOOLCHAIN")}
    presets = sorted(path.stem for path in (root / "models").glob("*.mk"))
    check(**given, presets=presets, toolchains=list(json.loads((root / "docker/toolchains.json").read_text())))


if __name__ == "__main__":
    errors.run(main)
