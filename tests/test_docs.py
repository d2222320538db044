"""What the documents promise exists; what scripts share is shared."""

import ast
import dataclasses
import importlib
import importlib.util
import itertools
import re
import shlex
import tomllib

import pytest
from conftest import ROOT, load, run_script

from common.__main__ import TOOLS

SCRIPTS = sorted(path.stem for path in (ROOT / "algos").glob("*.py"))
LOADABLE = [script for script in SCRIPTS if script != "dqn_lightning" or importlib.util.find_spec("lightning")]
DOCUMENTS = [path for folder in (".", "docs", "runs") for path in (ROOT / folder).glob("*.md")]
DOCUMENTS += (ROOT / "runs" / "reference").glob("*.sh")


def commands(text):
    """Every `python algos/x.py ...` in a text."""
    for match in re.finditer(r"python (algos/(\w+)\.py(?:[^\n`|#>&;]|\\\n)*)", text):
        yield match.group(2), shlex.split(match.group(1).replace("\\", ""))[1:]


@pytest.mark.parametrize("script", LOADABLE)
def test_every_flag_in_the_documents_is_one_the_script_has(script):
    names = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(load(script).Args)}
    names |= {name.replace("--", "--no-") for name in names} | {"--help"}
    texts = [path.read_text() for path in DOCUMENTS] + [load(script).__doc__]
    found = 0
    for text in texts:
        for name, words in commands(text):
            if name == script:
                found += 1
                assert {word for word in words if word.startswith("--")} <= names, words
    for flag in re.findall(r"`(--[a-z-]+)", load(script).__doc__):
        assert flag in names
    assert found >= 2


@pytest.mark.parametrize("path", ["common/args.py", *(f"algos/{script}.py" for script in SCRIPTS)])
def test_every_flag_says_what_it_is(path):
    classes = [node for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.ClassDef)]
    (args,) = [node for node in classes if node.name in ("Args", "RunArgs")]
    for field, after in itertools.pairwise([*args.body, None]):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(after, ast.Expr) and isinstance(after.value.value, str), field.target.id


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_metric_a_script_logs_is_in_its_docstring(script):
    source = (ROOT / "algos" / f"{script}.py").read_text()
    docstring = ast.get_docstring(ast.parse(source))
    for key in set(re.findall(r'"((?:charts|losses)/\w+)"', source)):
        assert key in docstring


# Flags of other programs: CleanRL, torchrun, SLURM, pip, TensorBoard, leet, pip-audit, and our plugin of pytest.
OTHERS = "wandb-project-name save-model exp-name upload-model no-autotune max-restarts nproc-per-node nnodes"
OTHERS += " rdzv-backend rdzv-endpoint ntasks-per-node signals-to-handle requeue wrap array"
OTHERS += " index-url logdir group print strict host plainrl-check"


def test_every_flag_in_the_pages_is_one_of_a_script_or_a_tool():
    tools = [importlib.import_module(f"common.tools.{module}").Args for module, _ in TOOLS.values()]
    fields = [field.name for args in [*tools, *(load(s).Args for s in LOADABLE)] for field in dataclasses.fields(args)]
    known = {"help", *OTHERS.split()} | {prefix + name.replace("_", "-") for name in fields for prefix in ("", "no-")}
    for script in (ROOT / "runs").rglob("*.py"):
        known |= set(re.findall(r'"--([a-z][a-z0-9-]+)"', script.read_text()))
    for page in (ROOT / name for name in ("README.md", "SECURITY.md", "CONTRIBUTING.md", "docs", "runs/README.md")):
        for path in [page] if page.is_file() else page.glob("*.md"):
            if path.name != "changed-names.md":  # it names what is gone
                shown = set(re.findall(r"(?<![\w-])--([a-z][a-z0-9-]+)", path.read_text()))
                assert shown <= known, (path.name, shown - known)


def test_every_field_is_used():
    for script in LOADABLE:
        source = (ROOT / "algos" / f"{script}.py").read_text()
        common = "".join(path.read_text() for path in (ROOT / "common").rglob("*.py"))
        for field in dataclasses.fields(load(script).Args):
            assert re.search(rf"args\.{field.name}\b", source + common), field.name


def test_functions_of_the_same_name_are_the_same():
    seen = {}
    for script in SCRIPTS:
        for node in ast.parse((ROOT / "algos" / f"{script}.py").read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name != "main":
                code = ast.dump(node)
                assert seen.setdefault(node.name, code) == code, node.name


def test_scripts_import_nothing_but_the_libraries_and_common():
    everywhere = {"copy", "itertools", "math", "dataclasses", "types", "torch", "gymnasium", "common"}
    for script in SCRIPTS:
        trainer = {"lightning", "logging", "signal", "warnings", "collections"} if script == "dqn_lightning" else set()
        for node in ast.walk(ast.parse((ROOT / "algos" / f"{script}.py").read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= everywhere | trainer


def test_every_fault_has_its_test():
    there = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        there |= {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
    lines = [line for line in (ROOT / "docs" / "faults.md").read_text().splitlines() if line.count("|") == 5]
    assert len(lines) > 45
    for line in lines:
        named = set(re.findall(r"`(test_\w+)`", line))
        assert named <= there, named - there
        assert named or line.startswith(("|---", "| what goes wrong")), line


def test_nothing_is_unpickled():
    for path in [*(ROOT / "common").rglob("*.py"), *(ROOT / "algos").glob("*.py")]:
        assert not re.search(r"weights_only=False|pickle\.loads?\(", path.read_text()), path


def words_in_code(text):
    return {word for span in re.findall(r"`([^`\n]+)`", text) for word in re.split(r"[\s;]+", span)}


def test_the_page_for_cleanrl_users_names_flags_and_metrics_that_exist():
    text = (ROOT / "docs" / "from-cleanrl.md").read_text().split("## Another name")[0]
    fields = set().union(*({field.name for field in dataclasses.fields(load(script).Args)} for script in LOADABLE))
    sources = [path.read_text() for folder in ("algos", "common") for path in (ROOT / folder).glob("*.py")]
    flags = {word for word in words_in_code(text) if word.startswith("--")}
    keys = {word for word in words_in_code(text) if re.match(r"(charts|losses)/", word)}
    assert len(flags) > 30
    assert len(keys) > 18
    assert {flag[2:].replace("-", "_") for flag in flags} <= fields
    for key in keys:
        assert any(f'"{key}"' in source for source in sources), key


def test_the_page_of_the_six_parts_names_what_exists():
    import common

    text = (ROOT / "docs" / "parts.md").read_text()
    ours = [line.split("|")[3:] for line in text.splitlines() if line.startswith("| ")]
    words = words_in_code("\n".join("|".join(cells) for cells in ours)) | words_in_code(text.split("What follows")[1])
    defined = {
        node.name
        for path in [*(ROOT / "algos").glob("*.py"), *(ROOT / "common").glob("*.py")]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
    }
    checked = 0
    for word in words:
        if match := re.match(r"common\.(\w+)", word):
            assert hasattr(common, match[1]), word
        elif re.fullmatch(r"(common|algos)/\w+\.py", word):
            assert (ROOT / word).exists(), word
        elif re.fullmatch(r"[A-Z]\w+|\w+_loss|gae|act|update", word) and "." not in word:
            assert word in defined or word == "SimpleNamespace", word
        else:
            continue
        checked += 1
    assert checked > 20


PAGES = sorted(path for path in DOCUMENTS if path.suffix == ".md")


def anchors(path):
    """The anchors that GitHub makes of the headings of a page."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    slugs = [
        re.sub(r"[^\w\- ]", "", line).replace(" ", "-").lower() for line in re.findall(r"^#+ +(.+?) *$", text, re.M)
    ]
    return {f"{slug}-{slugs[:i].count(slug)}" if slug in slugs[:i] else slug for i, slug in enumerate(slugs)}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(path):
    for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", path.read_text()):
        target = target[0] or target[1]
        if re.match(r"https?://|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = path.parent / file if file else path
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_the_anchors_of_headings_are_githubs(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b-c`, d & e: 2.0\n```\n# no heading\n```\n## Same\n## Same\n")
    assert anchors(page) == {"a-b-c-d--e-20", "same", "same-1"}


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    linked = re.findall(r"^\| \[([\w-]+\.md)\]\(\1\)", index, re.M)
    assert sorted(linked) == sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name != "README.md")


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 7 * 1024


def test_the_readme_lists_every_script_with_its_length():
    rows = re.findall(r"^\| \[(\w+)\.py\]\(algos/\1\.py\) .* (\d+) \|$", (ROOT / "README.md").read_text(), re.M)
    lengths = {script: (ROOT / "algos" / f"{script}.py").read_text().count("\n") for script in SCRIPTS}
    assert {script: pytest.approx(int(lines), abs=10) for script, lines in rows} == lengths  # to the nearest ten


def test_ci_runs_the_commands_of_the_readme():
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    shown = [line.partition(" #")[0].strip() for block in blocks for line in block.splitlines()]
    ci = (ROOT / ".ci" / "run").read_text().replace(" --quiet", "").splitlines()
    for command in ('pip install -e ".[test]"', "pytest"):
        assert command in shown
        assert command in ci


def test_the_environment_of_the_readme_trains(tmp_path):
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    (command,) = re.findall(r"^python (algos/ppo\.py .*corridor:.*)$", (ROOT / "README.md").read_text(), re.M)
    (tmp_path / "corridor.py").write_text(code)
    _, *flags = command.split()
    done = run_script(*flags, "--no-track", script="ppo", cwd=tmp_path)
    assert "warn" not in (done.stdout + done.stderr).lower()
    assert "greedy evaluation -1.0 ± 0.0" in done.stdout  # ten steps to the goal


def test_the_citation_is_of_this_version():
    cited = dict(re.findall(r"^([\w-]+): (.+)$", (ROOT / "CITATION.cff").read_text(), re.M))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert cited["cff-version"] == "1.2.0"
    assert cited["version"] == project["version"]
    assert cited["license"] == project["license"]
    assert {"title", "message", "authors"} <= set(re.findall(r"^(\w+):", (ROOT / "CITATION.cff").read_text(), re.M))
