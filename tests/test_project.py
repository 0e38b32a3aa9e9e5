"""The project has the shape that its documents promise: commands, dependencies, folders, imports, names, links."""

from __future__ import annotations

import ast
import configparser
import graphlib
import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "azure_torch_ckpt"

# The folders and modules that may import azure.*.
SDK_USERS = {"_internal.shared_tokens", "blobs", "credentials", "transport"}

TOP_LEVEL = {
    "CHANGELOG.md",
    "LICENSE",
    "README.md",
    PACKAGE,
    "constraints.txt",
    "docs",
    "examples",
    "pyproject.toml",
    "tests",
    "tox.ini",
}


def module_paths() -> list[Path]:
    return sorted((ROOT / PACKAGE).rglob("*.py"))


def dotted_name(path: Path) -> str:
    """``azure_torch_ckpt.dcp.writer``; a package has the name of its directory."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(path: Path) -> set[str]:
    """Dotted names of all that a file imports, anywhere in it: ``a.b`` for ``import a.b`` and ``from a import b``."""
    package = dotted_name(path) if path.name == "__init__.py" else dotted_name(path).rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*anchor, base] if base else anchor)
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def import_graph() -> dict[str, set[str]]:
    """The modules of the package that each of them imports; of a name, the module that it is taken from."""
    modules = {dotted_name(path) for path in module_paths()}
    return {
        dotted_name(path): {name if name in modules else name.rpartition(".")[0] for name in imported_names(path)}
        & modules
        for path in module_paths()
    }


def rows_of_the_table() -> list[list[str]]:
    """The folders and modules in the first cells of the architecture's table, as dotted names, top row first."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = re.search(r"^\| where \|.*\n\|[-| ]*\n((?:\|.*\n)+)", text, flags=re.MULTILINE)
    assert table, "docs/architecture.md has no table whose first column is called where"
    cells = [re.findall(r"`([\w/]+?)(?:/|\.py)`", row.split("|")[1]) for row in table[1].splitlines()]
    return [[dotted_name(ROOT / PACKAGE / f"{name}.py") for name in cell] for cell in cells]


def rows_of_modules() -> dict[str, int]:
    """Each module's row in the table: that of the innermost folder with a row."""
    rows = {name: row for row, names in enumerate(rows_of_the_table()) for name in names}
    found: dict[str, int] = {PACKAGE: rows.pop(PACKAGE)}
    for path in module_paths():
        name = dotted_name(path)
        fitting = [row for row in rows if f"{name}.".startswith(f"{row}.")]
        if fitting:
            found[name] = rows[max(fitting, key=len)]
    return found


def test_every_module_has_a_row_and_every_row_a_module() -> None:
    rows = rows_of_modules()
    assert set(rows) == {dotted_name(path) for path in module_paths()}
    for name in itertools.chain(*rows_of_the_table()):
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), name


def test_imports_point_down_the_table() -> None:
    rows = rows_of_modules()
    upwards = [
        f"{module} imports {target}"
        for module, targets in import_graph().items()
        for target in targets
        if rows[target] < rows[module]
    ]
    assert not upwards


def test_imports_have_no_circles() -> None:
    """A folder's `__init__` imports from its modules, so they must not import it."""
    graphlib.TopologicalSorter(import_graph()).prepare()  # raises CycleError


def test_only_blobs_transport_credentials_and_tokens_import_the_azure_sdk() -> None:
    users = {
        dotted_name(path).removeprefix(f"{PACKAGE}.")
        for path in module_paths()
        if any(name.split(".")[0] == "azure" for name in imported_names(path))
    }
    assert {user if user in SDK_USERS else user.split(".")[0] for user in users} == SDK_USERS


def test_lightning_is_imported_in_one_module_of_each_package() -> None:
    """It comes as two distributions, for which both packages share the other modules: see `lightning/stock.py`."""
    distributions = {"lightning", "lightning_fabric", "pytorch_lightning"}
    users = {
        dotted_name(path)
        for path in module_paths()
        if any(name.split(".")[0] in distributions for name in imported_names(path))
    }
    assert users == {f"{PACKAGE}.lightning.namespace", f"{PACKAGE}.pytorch_lightning.namespace"}


def test_private_names_of_torch_are_imported_in_one_module_and_those_of_others_nowhere() -> None:
    users = {
        dotted_name(path)
        for path in module_paths()
        for name in imported_names(path)
        if not name.startswith(PACKAGE) and re.search(r"\._(?!_)", name)
    }
    assert users == {f"{PACKAGE}._internal.torch_private"}


def test_private_attributes_of_lightning_are_used_in_one_module() -> None:
    """The methods that classes override, which `stock.OVERRIDES` lists, are called on `super()`."""
    users = {
        path.name
        for path in (ROOT / PACKAGE / "lightning").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and re.match(r"_(?!_)", node.attr)
        if ast.unparse(node.value) not in ("self", "cls", "super()")
    }
    assert users == {"stock.py"}


def test_a_class_name_occurs_once() -> None:
    modules: dict[str, list[str]] = {}
    for path in module_paths():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                modules.setdefault(node.name, []).append(dotted_name(path))
    assert {name: where for name, where in modules.items() if len(where) > 1} == {}


def documents() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def anchors(document: Path) -> set[str]:
    """GitHub's names of a document's headings."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_of_the_documents_lead_somewhere() -> None:
    broken: list[str] = []
    for document in documents():
        text = document.read_text(encoding="utf-8")
        for file, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
            target = (document.parent / file).resolve() if file else document
            if not target.exists() or (anchor and anchor not in anchors(target)):
                broken.append(f"{document.relative_to(ROOT)}: {file}#{anchor}")
    assert not broken


def test_files_that_the_project_names_are_there() -> None:
    """In documents, docstrings and comments; of another project's files, the URL is named."""
    named = re.compile(r"(?<![\w/.-])(?:azure_torch_ckpt|docs|examples|tests)/[a-z0-9_/]+\.(?:json|md|py)\b")
    sources = [path for folder in (PACKAGE, "examples", "tests") for path in (ROOT / folder).rglob("*.py")]
    missing = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in [*documents(), *sources, ROOT / "pyproject.toml", ROOT / "tox.ini"]
        for name in named.findall(path.read_text(encoding="utf-8"))
        if not (ROOT / name).exists()
    }
    assert not missing


def test_ci_runs_the_test_command_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    fenced = re.findall(r"^```sh\n(.*?)^```", readme, flags=re.MULTILINE | re.DOTALL)
    commands = [line for block in fenced for line in block.splitlines() if line.startswith("python3 -m venv ")]
    ci = [line for line in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    quickstart, tests = commands
    assert quickstart == f"{tests} -e quickstart"
    assert ci == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', tests]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def pyproject() -> dict[str, Any]:
    data: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return data


def requirements() -> list[Requirement]:
    project = pyproject()["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    return [Requirement(line) for line in [*project["dependencies"], *extras]]


def test_dependencies_have_lower_bounds_only() -> None:
    assert {"torch", "azure-storage-blob"} <= {requirement.name for requirement in requirements()}
    bounds = {clause.operator for requirement in requirements() for clause in requirement.specifier}
    assert bounds == {">="}


def test_every_dependency_is_pinned_for_the_tests() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line[:1] != "#"]
    assert {clause.operator for pin in pins for clause in pin.specifier} == {"=="}
    pinned = {canonicalize_name(pin.name) for pin in pins}
    assert {canonicalize_name(requirement.name) for requirement in requirements()} <= pinned


def test_the_floors_are_tested() -> None:
    """``tox -e floors`` runs with the lower bounds of what users install: a bound that no test runs with is a guess."""
    project = pyproject()["project"]
    extras = project["optional-dependencies"]
    bounds = [Requirement(line) for line in [*project["dependencies"], *extras["cli"], *extras["lightning"]]]
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini", encoding="utf-8")
    pins = [Requirement(line) for line in tox["testenv:floors"]["deps"].split("\n") if line]
    floors = {pin.name: Version(str(pin.specifier).removeprefix("==")) for pin in pins}
    assert floors == {bound.name: Version(str(bound.specifier).removeprefix(">=")) for bound in bounds}
    oldest, newest = (tox[f"testenv:{name}"]["base_python"].removeprefix("python") for name in ("floors", "newest"))
    assert project["requires-python"] == f">={oldest}"
    prefix = "Programming Language :: Python :: 3."
    minors = [int(line.removeprefix(prefix)) for line in project["classifiers"] if line.startswith(prefix)]
    assert (f"3.{min(minors)}", f"3.{max(minors)}") == (oldest, newest)


def test_the_workflows_run_environments_that_exist() -> None:
    text = (ROOT / "tox.ini").read_text(encoding="utf-8")
    known = set(re.findall(r"^\[testenv:([\w-]+)\]", text, flags=re.MULTILINE)) | {"py310", "py311", "py312", "py313"}
    used: set[str] = set()
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        for job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values():
            used |= {line["environment"] for line in job.get("strategy", {}).get("matrix", {}).get("include", [])}
            used |= set(re.findall(r"tox -e ([\w-]+)", "\n".join(step.get("run", "") for step in job["steps"])))
    assert {"floors", "newest", "lint"} <= used <= known


def test_the_top_folder_has_no_other_files() -> None:
    listing = subprocess.run(
        # Without safe.directory, git refuses a checkout of another user, as CI services may have it.
        ["git", "-c", f"safe.directory={ROOT}", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    entries = {name.split("/")[0] for name in listing.split("\0") if name}
    assert "pyproject.toml" in entries
    assert {entry for entry in entries if not entry.startswith(".")} <= TOP_LEVEL


def test_public_names_exist_and_torch_is_imported_with_the_first_that_needs_it() -> None:
    """Otherwise `azure-torch-ckpt --help` and its completion would take seconds."""
    code = (
        "import sys, azure_torch_ckpt as package\n"
        "assert 'torch' not in sys.modules, 'too early'\n"
        "assert all(getattr(package, name) is not None for name in package.__all__)\n"
        "assert 'torch' in sys.modules\n"
        "assert set(package.__all__) <= set(dir(package)) and package.catalog.prune is package.prune\n"
        "import azure_torch_ckpt.cli.app\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
