"""What the documents promise exists; what scripts share is shared."""

import ast
import dataclasses
import importlib.util
import itertools
import re
import shlex

import pytest
from conftest import ROOT, load

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
    for path in (ROOT / "tests").glob("test_*.py"):
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


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_to_files_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)|src=\"([^\"]+)\"", path.read_text()):
        target = target[0] or target[1]
        assert re.match(r"https?://|mailto:", target) or (path.parent / target).exists(), target
