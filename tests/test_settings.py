"""The table of settings: a report with a right command refuses every value that it forbids,
and the pages agree with it."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from project import ROOT
from stand_ins import on_path

from scripts import reports, settings
from scripts.making import choice, journey, toolchain

WRONG = [(setting.name, value) for setting in settings.TABLE for value in settings.wrong_values(setting)]


def typed(words: dict[str, str], goal: str = "serve") -> choice.Typed:
    return choice.Typed([goal], words, asked=True)


def command_for(words: dict[str, str], monkeypatch: pytest.MonkeyPatch, goal: str = "serve") -> list[str]:
    """The command of the report on these settings; it must be refused no more."""
    asked = typed(words, goal)
    values = choice.values_of(words)
    names = choice.refused(asked, values)
    assert names, words
    monkeypatch.setenv("BAKE_SETTINGS", "\n".join(f"{name}={value}" for name, value in words.items()))
    monkeypatch.setenv("BAKE_GOAL", goal)
    problem = settings.problem(names, {**words, **values}, choice.presets(), choice.toolchains(), goal)
    assert "Traceback" not in problem.report() and problem.report().splitlines()[-1].strip()
    return shlex.split(problem.command.splitlines()[-1])


def taken(command: list[str]) -> bool:
    """Whether the settings of a command would be taken."""
    assert command[0] == "make", command
    words = dict(word.split("=", 1) for word in command[2:])
    return not choice.refused(typed(words, command[1]), choice.values_of(words))


def test_every_setting_is_right_by_itself() -> None:
    assert len(settings.BY_NAME) == len(settings.TABLE)
    values = {setting.name: setting.default for setting in settings.TABLE}
    assert settings.wrong(values) == []
    for setting in settings.TABLE:
        assert settings.fits(setting, setting.example), setting.name
        assert all(settings.fits(setting, word) for word in setting.words), setting.name
        assert setting.with_torch is None or settings.fits(setting, setting.with_torch), setting.name


def test_every_setting_but_free_text_refuses_something() -> None:
    free = {setting.name for setting in settings.TABLE if setting.free}
    assert {name for name, _ in WRONG} == set(settings.NAMES) - free
    assert len(WRONG) > 300


@pytest.mark.parametrize("name", settings.NAMES)
def test_each_wrong_value_is_a_report_whose_command_is_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for value in settings.wrong_values(settings.BY_NAME[name]):
        setting = settings.BY_NAME[name]
        goal = setting.goals[0] if setting.goals else "serve"
        if value.strip() != value and settings.fits(setting, value.strip()):
            continue
        command = command_for({name: value}, monkeypatch, goal)
        if command[0] == "ln":  # a path that make cannot take: a link to it, and the same word
            assert command[-1] == f"{name}=/tmp/linked" and command[-2] == goal
        else:
            assert taken(command), (name, value, command)
            assert command[1] == ("plan" if name == "ASSUME_GPU" else goal)


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("QUANT=int4", "QUANT=int4_awq ENGINE=tensorrt"),
        ("QUANT=fp8", "QUANT=fp8 ENGINE=tensorrt"),
        ("QUANT=int8 ENGINE=tensorrt", "QUANT=int8_wo ENGINE=tensorrt"),
        ("PP=2", "PP=2 ENGINE=tensorrt"),
        ("DTYPE=bf16 TP=4", "DTYPE=bfloat16 TP=4"),
        ("ENGINE=tensorrt-llm", "ENGINE=tensorrt"),
        ("MODEL=lama-2-7b", "MODEL=llama-2-7b"),
        ("MODEL=meta-llama/Llama-2-7b-hf", "MODEL=weights/Llama-2-7b-hf SOURCE=hf:meta-llama/Llama-2-7b-hf"),
        ("TARGT=cuda", "TARGET=cuda"),
        ("VERSON=1.0", "VERSION=1.0"),
        ("IMGE=x", "IMAGE=x"),
        ("BENHC=x", "BENCH=x"),
        ("TP=x DTYPE=fp16 QUANT=int4", "TP=2 DTYPE=float16 QUANT=int4_awq ENGINE=tensorrt"),
    ],
)
def test_the_advice_keeps_the_wish(words: str, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    asked = dict(word.split("=", 1) for word in words.split())
    if "/" in asked.get("MODEL", ""):  # with -n missing weights are not a fault
        monkeypatch.setattr(choice.Typed, "asked", False)
        goal = "serve"
        values = choice.values_of(asked)
        problem = settings.problem(["WEIGHTS"], values, choice.presets(), choice.toolchains(), goal)
        assert sorted(shlex.split(problem.command)[2:]) == sorted(advice.split())
        return
    assert sorted(command_for(asked, monkeypatch)[2:]) == sorted(advice.split())


def test_all_wrong_settings_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names = choice.refused(typed({}), choice.values_of({"TP": "x", "BUILDER": "podman", "LICENSE": "x&y"}))
    assert names == ["TP", "BUILDER", "LICENSE"]
    values = choice.values_of({"TP": "x", "BUILDER": "podman", "LICENSE": "x&y"})
    seen = settings.problem(names, values, choice.presets(), choice.toolchains(), "image").seen
    assert all(said in seen for said in ("TP is 'x'", "BUILDER is 'podman'", "LICENSE is 'x&y'"))


def test_a_file_that_is_not_there_is_not_advised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command makes it, or does without."""
    monkeypatch.chdir(ROOT)
    assert "> keys && make serve" in " ".join(command_for({"API_KEY_FILE": "keys"}, monkeypatch, "serve"))
    assert command_for({"CHAT_TEMPLATE": "not.jinja"}, monkeypatch, "serve")[1:] == ["serve", "CHAT_TEMPLATE="]


def test_pad_heads_and_quantization_do_not_go_together() -> None:
    values = choice.values_of({"ENGINE": "tensorrt", "QUANT": "fp8", "PAD_HEADS": "on"})
    assert settings.wrong(values) == ["PAD_HEADS"]
    assert settings.repair("PAD_HEADS", values) == {"PAD_HEADS": "off"}


def test_a_command_line_comes_before_the_preset_and_that_before_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TP", "7")
    assert choice.values_of({})["MAX_BATCH_SIZE"] == "16"  # models/stories.mk
    assert choice.values_of({"MAX_BATCH_SIZE": "3"})["MAX_BATCH_SIZE"] == "3"
    assert choice.values_of({"MODEL": "llama-2-70b"})["TP"] == "8"
    assert choice.values_of({"MODEL": "./models/stories"})["TP"] == "2"


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "models").glob("*.mk"))])
def test_every_preset_is_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert choice.refused(typed({"MODEL": name}), choice.values_of({"MODEL": name})) == []


def test_a_preset_with_another_line_is_a_report(tmp_path: Path) -> None:
    path = tmp_path / "x.mk"
    path.write_text("# fine\nTP = 2 # fine\nifdef X\n")
    with pytest.raises(reports.Problem, match="a preset cannot be read") as caught:
        choice.preset(path)
    assert "ifdef X" in caught.value.seen
    path.write_text("include models/families/none.mk\n")
    with pytest.raises(reports.Problem, match="a preset cannot be read"):
        choice.preset(path)


def test_presets_share_a_file_and_may_say_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models/families").mkdir(parents=True)
    Path("models/families/all.mk").write_text("WEIGHTS = weights/$(MODEL) # a comment\nTP = 2\nDTYPE = float16\n")
    Path("models/one.mk").write_text("include models/families/all.mk\nTP = 4\n")
    assert choice.presets() == ["one"]
    assert choice.preset(Path("models/one.mk")) == {"WEIGHTS": "weights/one", "TP": "4", "DTYPE": "float16"}


def test_the_page_has_the_table() -> None:
    page = (ROOT / "docs/settings.md").read_text()
    table = page[page.index("| setting |") :]
    assert table.strip() + "\n" == settings.table_page()
    assert max(map(len, settings.table_page().splitlines())) <= 120


def test_the_makefile_reads_nothing_that_nobody_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it reads is a setting, is made by scripts/making, or is set in the Makefile itself."""
    monkeypatch.chdir(ROOT)
    text = "\n".join(line for line in (ROOT / "Makefile").read_text().splitlines() if not line.startswith("#"))
    read = set(re.findall(r"(?<!\$)\$\(([A-Za-z_]+)\)", text))
    own = set(re.findall(r"^(?:define )?([A-Za-z_]+) *(?::=|=|\+=|$)", text, re.MULTILINE))
    values = {**choice.values_of({}), "TOOLCHAIN": list(toolchain.rows())[0]}
    given = set(journey.variables(typed({}), values, [])) | set(settings.NAMES)
    assert read - own - given <= {"CURDIR", "MAKE", "MAKECMDGOALS", "MAKELEVEL"}


def test_any_python_from_3_8_on_decides_with_its_standard_library_alone() -> None:
    """What is loaded, reports included, is read as 3.8 reads it. No package is in reach: -S,
    and an empty environment."""
    ask = "from scripts import reports, settings; from scripts.making import journey; from scripts.weights import shape"
    words = [sys.executable, "-ESBI", "-X", "importtime", "-c", f"import sys; sys.path.insert(0, '.'); {ask}"]
    done = subprocess.run(words, cwd=ROOT, env={}, capture_output=True, text=True, check=True, timeout=60)
    names = re.findall(r"^import time:.*\| +(scripts[\w.]*)$", done.stderr, re.MULTILINE)
    paths = [ROOT / f"{name.replace('.', '/')}.py" for name in names]
    assert len([path for path in paths if path.is_file()]) > 20
    for path in [*filter(Path.is_file, paths), ROOT / "scripts/making/__main__.py", ROOT / "scripts/making/seen.py"]:
        tree = ast.parse(path.read_text(), feature_version=(3, 8))
        assert any("annotations" in ast.unparse(line) for line in tree.body[:2]), (
            f"{path.name}: without the future import 3.8 evaluates annotations"
        )
        for node in ast.walk(Unannotated().visit(tree)):
            if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in BUILTINS:
                assert isinstance(node.ctx, ast.Store) or not is_generic(node), f"{path.name}:{node.lineno}"


class Unannotated(ast.NodeTransformer):
    """A module without what `from __future__ import annotations` leaves unevaluated."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        return ast.arg(node.arg)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        return ast.Expr(node.value or ast.Constant(None))


BUILTINS = ("dict", "list", "tuple", "set", "frozenset", "type")


def is_generic(node: ast.Subscript) -> bool:
    return not isinstance(node.slice, ast.Constant)


def test_a_make_with_nothing_to_do_asks_once_and_writes_nothing(tmp_path: Path, tree: Path) -> None:
    """One python3 is started, and neither nvidia-smi, docker nor git."""
    log = tmp_path / "log"
    for program in ("python3", "nvidia-smi", "docker", "git"):
        real = shutil.which(program) or "/bin/true"
        on_path(tmp_path, program, f'echo {program} >>"{log}"\nexec {real} "$@"\n')
    before = {path: path.stat().st_mtime_ns for path in tree.glob("build/**/*")}
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["make", "-q", "serve"], cwd=tree, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    assert (done.returncode in (0, 1), done.stderr) == (True, "")
    assert log.read_text().splitlines() == ["python3"]
    assert before == {path: path.stat().st_mtime_ns for path in tree.glob("build/**/*")}


def test_what_is_typed_cannot_become_a_line_of_the_makefile(tree: Path) -> None:
    for word in (
        "TP={newline}$(shell touch pwned)",
        "TP=2\n$(shell touch pwned)",
        "PROMPT={newline}$(shell touch pwned)",
    ):
        for goal in ("plan", "config"):
            subprocess.run(["make", "-n", goal, word], cwd=tree, capture_output=True, timeout=60, check=False)
            assert not (tree / "pwned").exists(), word


# --- values that files repeat which no Python reads ---

# file -> how it says a port: (the first word of the setting's name, the port)
NAMED_PORTS = {
    "docker/compose.yaml": r"\$\{(\w+)_PORT:-(\d+)\}:\2\b",
    "docker/chart/templates/deployment.yaml": r"\{name: (\w+), containerPort: (\d+)\}",
    "docker/chart/templates/service.yaml": r"\{name: (\w+), port: (\d+), targetPort: \1\}",
}
PAGES_WITH_PORTS = (
    "docker/Dockerfile", "docker/compose.yaml", "docker/chart/values.yaml", "docker/chart/templates/*", "docker/prometheus.yaml",
    "docker/haproxy.cfg", "docs/leaderworkerset.yaml", "README*.md", "SECURITY.md", "docs/endpoint.md", "docs/image.md",
    "docs/operations.md", "docs/serving.md",
)  # fmt: skip


@pytest.mark.parametrize("file", NAMED_PORTS)
def test_files_open_the_default_ports_by_their_names(file: str) -> None:
    found = {
        f"{name.upper()}_PORT": int(port) for name, port in re.findall(NAMED_PORTS[file], (ROOT / file).read_text())
    }
    assert {name: port for name, port in found.items() if name != "PROMETHEUS_PORT"} == settings.PORTS


def test_the_image_exposes_the_default_ports_and_pages_name_no_others() -> None:
    ports = [str(port) for port in settings.PORTS.values()]
    assert f"EXPOSE {' '.join(ports)}\n" in (ROOT / "docker/Dockerfile").read_text()
    for pattern in PAGES_WITH_PORTS:
        files = [path for path in ROOT.glob(pattern) if path.is_file()]
        assert files, pattern
        for path in files:
            found = set(re.findall(r"(?<![\d.,])[89]00\d\b(?![.,]?\d)", path.read_text()))
            assert found <= set(ports), path


def test_the_text_models_ask_the_default_port_if_they_are_told_none() -> None:
    """It is Triton's own default, and what they run in has no table of settings."""
    code = ast.parse((ROOT / "model_repo_template/tensorrt_llm_bls/1/text_model.py").read_text())
    values = [node.value for node in ast.walk(code) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert f"127.0.0.1:{settings.PORTS['GRPC_PORT']}" in values
