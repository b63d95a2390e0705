"""The order of the house: who may import whom, and what no file may hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

import click
import pytest

import fedgraft
from configs import choices
from tests.support.paths import ROOT

# Each folder may import itself and the folders of the ranks before its own; two folders of one rank never each other.
RANKS = (
    ("configs",),
    ("experts",),
    ("models",),
    ("federated",),
    ("clients", "server"),
    ("introspection", "analysis"),
    ("ui",),
    ("scripts",),
)
RANK = {folder: rank for rank, folders in enumerate(RANKS) for folder in folders}
# Inside a folder, its modules ("") and sub-folders in import order: each may import those before it.
ROOMS = {
    "experts": ("", "graph", "saliency", "selection", "merging"),
    "models": (
        "",
        "remote_code",
        "families",
        "runtime",
        "files",
        "graph",
        "checkpoints",
        "bootstrap",
        "healing",
        "moe",
        "moe_files",
        "export",
    ),
    "federated": ("", "updates", "wire", "selection", "aggregation", "protocol", "data"),
    "clients": ("training", "residents", "state", ""),
    "server": ("model", "privacy", "reporting", "state", "strategies", "rounds", "", "flower"),
    "ui": ("shared", "experts", "run", "diff", "chat", ""),
    "scripts": ("shared", "verbs", "tools", "", "deploy"),
}
LARGEST_FOLDER = 16
LONGEST_FUNCTION = 50  # lines, signature and docstring included
QUESTION = re.compile(r"(What|Which|How|From|Who|Whose|Where|When)\b")
IDIOMS = re.compile(
    r"\b(nobody|anew|told|in vain|goes up into|as it pays|minds|says (?:little|nothing)|was counted|have had, had)\b"
)
CHECKPOINT_LIBRARIES = {"torch", "transformers", "huggingface_hub"}
MACHINE_PATH = re.compile(r"""(?<![\w.~}$*<])/(?:work|root|Users)/[\w.-]+|(?<![\w.~}$*<])/tmp/w\b""")


def tracked() -> list[Path]:
    """Files under version control that are there; the whole folder without what is never shipped, where git is not."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listed.returncode == 0:
        names = listed.stdout.decode().split("\0")
        return [ROOT / name for name in names if name and (ROOT / name).is_file()]
    hidden = {".venv", ".git", "__pycache__", "build", "logs"}
    return [
        path for path in ROOT.rglob("*") if path.is_file() and not hidden & set(path.relative_to(ROOT).parts)
    ]


def modules() -> list[Path]:
    return [path for path in tracked() if path.suffix == ".py"]


def imports(source: str) -> set[tuple[int, str]]:
    """Every import of a module, top-level and nested: ``(level of dots, dotted name)``."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {(0, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.level, node.module or ""))
    return found


def trespasses(folder: str, source: str) -> list[str]:
    """Imports of a module in ``folder`` that the order of the house forbids."""
    allowed = {other for other, rank in RANK.items() if rank < RANK[folder]} | {folder}
    tops = {name.partition(".")[0] for level, name in imports(source) if level == 0}
    return sorted((tops & set(RANK)) - allowed) + sorted(tops & {"fedgraft", "tests", "benchmarks"})


def room_of(parts: tuple[str, ...]) -> str:
    """The sub-folder of a module by the parts of its path or dotted name; "" for a module of the folder itself."""
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS[parts[0]] else ""


def room_trespasses(parts: tuple[str, ...], source: str) -> list[str]:
    """Imports of the module at ``parts`` that the order of the sub-folders of its folder forbids."""
    rooms = ROOMS[parts[0]]
    rank = rooms.index(room_of(parts))
    targets = {tuple(name.split(".")) for level, name in imports(source) if level == 0}
    inside = {target for target in targets if target[0] == parts[0] and len(target) > 1}
    return sorted(".".join(target) for target in inside if rooms.index(room_of(target)) > rank)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


HOUSE = [path for path in modules() if path.relative_to(ROOT).parts[0] in RANK]


@pytest.mark.parametrize("path", HOUSE, ids=name_of)
def test_a_module_imports_only_what_stands_before_its_folder(path):
    assert trespasses(path.relative_to(ROOT).parts[0], path.read_text()) == []


def test_the_order_can_be_broken():
    assert trespasses("configs", "import experts.graph.expert_graph") == ["experts"]
    assert trespasses("clients", "def f():\n    from server.rounds import load") == ["server"]
    assert trespasses("server", "import clients.training.trainer as trainer") == ["clients"]
    assert trespasses(
        "models", "from federated.wire import codec\nfrom scripts.shared.console import progress"
    ) == [
        "federated",
        "scripts",
    ]
    assert trespasses("experts", "import torch, models.bootstrap.build") == ["models"]
    assert trespasses("federated", "from fedgraft import main") == ["fedgraft"]
    assert (
        trespasses("server", "from configs.errors import UserError\nfrom federated.wire.codec import x") == []
    )
    assert trespasses("scripts", "import clients.x, server.y, ui.z") == []


@pytest.mark.parametrize(
    "path", [path for path in HOUSE if path.relative_to(ROOT).parts[0] in ROOMS], ids=name_of
)
def test_a_module_imports_only_sub_folders_before_its_own(path):
    assert room_trespasses(path.relative_to(ROOT).parts, path.read_text()) == []


def test_the_order_of_sub_folders_can_be_broken():
    assert room_trespasses(("models", "files", "x.py"), "from models.moe.views import experts_of") == [
        "models.moe.views"
    ]
    assert room_trespasses(("models", "moe", "x.py"), "from models.files.side_files import y") == []
    assert room_trespasses(("clients", "state", "x.py"), "def f():\n    import clients.participant") == [
        "clients.participant"
    ]
    assert room_trespasses(("clients", "participant.py"), "import clients.state.store") == []


def test_every_sub_folder_has_its_place_in_the_order():
    for folder, rooms in ROOMS.items():
        found = {
            path.parent.relative_to(ROOT / folder).parts[:1]
            for path in HOUSE
            if path.is_relative_to(ROOT / folder)
        }
        assert {parts[0] if parts else "" for parts in found} <= set(rooms), folder


def test_no_folder_holds_more_source_files_than_a_reader_can_survey():
    counts = Counter(path.parent for path in modules() if path.name != "__init__.py")
    assert len(counts) > 30
    assert {name_of(folder): count for folder, count in counts.items() if count > LARGEST_FOLDER} == {}


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


SOURCES = [path for path in modules() if path.relative_to(ROOT).parts[0] != "tests"]


def test_no_function_is_longer_than_a_screen():
    lengths = {
        f"{name_of(path)}:{function.name}": function.end_lineno - function.lineno + 1
        for path in SOURCES
        for function in functions(path)
    }
    assert len(lengths) > 1000
    assert {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION} == {}


def docstrings(path: Path) -> list[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]
    return [text for node in nodes if (text := ast.get_docstring(node))]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_docstrings_name_operation_and_quantity(path):
    module = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert not QUESTION.match(module), module
    assert [text for text in docstrings(path) if IDIOMS.search(text)] == []


def test_idioms_are_recognized():
    assert QUESTION.match("What a client ships") and not QUESTION.match("Whether a graph is reachable")
    assert IDIOMS.search("An expert nobody shipped") and IDIOMS.search("what was sent in vain was sent, too")
    assert not IDIOMS.search("Routing frequency, summed gate weight, summed output L2 norm (EAN).")


def test_every_folder_of_code_has_its_place():
    folders = {path.relative_to(ROOT).parts[0] for path in modules() if path.parent != ROOT}
    assert {"configs", "experts", "models", "federated", "clients", "server", "scripts"} <= folders
    assert folders <= set(RANK) | {"tests", "benchmarks"}
    assert {path.name for path in modules() if path.parent == ROOT} == {"fedgraft.py"}


def test_no_two_modules_import_each_other_in_a_circle():
    names = {name_of(path)[:-3].replace("/", "."): path for path in HOUSE if path.name != "__init__.py"}
    edges = {
        name: {
            target
            for level, imported in imports(path.read_text())
            for target in ([imported] if level == 0 else [f"{name.rpartition('.')[0]}.{imported}"])
            if target in names and target != name
        }
        for name, path in names.items()
    }
    done: set[str] = set()
    while ready := {name for name, targets in edges.items() if name not in done and targets <= done}:
        done |= ready
    assert set(edges) - done == set()


def undocumented(source: str) -> list[str]:
    """Public classes and functions without a docstring, functions inside of functions left out."""

    def inside(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[str]:
        for each in node.body:
            if not isinstance(each, ast.ClassDef | ast.FunctionDef) or each.name.startswith("_"):
                continue
            if not ast.get_docstring(each):
                yield prefix + each.name
            if isinstance(each, ast.ClassDef):
                yield from inside(each, f"{prefix}{each.name}.")

    return list(inside(ast.parse(source), ""))


DOCUMENTED = [*SOURCES, *(path for path in modules() if path.is_relative_to(ROOT / "tests/support"))]


@pytest.mark.parametrize("path", DOCUMENTED, ids=name_of)
def test_public_classes_and_functions_have_a_docstring(path):
    assert undocumented(path.read_text()) == []


def test_missing_docstrings_are_recognized():
    source = (
        "class A:\n    def f(self): ...\n    def _g(self): ...\n\n"
        "def f():\n    'Sum of A.'\n    def g(): ...\n\nclass _B:\n    def f(self): ...\n"
    )
    assert undocumented(source) == ["A", "A.f"]


CHOICES = {
    name: {choice.value for choice in found}
    for name, found in vars(choices).items()
    if isinstance(found, type) and issubclass(found, StrEnum) and len(found) > 1
}


def repeated_choices(source: str) -> list[str]:
    """Enumerations of ``configs.choices`` of which a tuple, list or set in a module has all values as literals."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Tuple | ast.List | ast.Set)]
    literals = [{each.value for each in node.elts if isinstance(each, ast.Constant)} for node in nodes]
    return sorted({name for name, values in CHOICES.items() if any(values <= found for found in literals)})


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_choices_are_listed_in_their_enumeration_only(path):
    assert repeated_choices(path.read_text()) == []


def test_repeated_choices_are_recognized():
    assert len(CHOICES) > 10
    assert repeated_choices('METRICS = ("reap", "ean", "freq", "weighted_freq")') == ["Metric"]
    assert repeated_choices('device: Literal["auto", "cpu", "cuda"] = "auto"') == ["Device"]
    assert repeated_choices('KNOWN = ["all", "train", None, "valid"]') == ["Split"]
    assert repeated_choices('PARTS = ("train", "valid")\nf(device in ("cpu", "cuda"))') == []


FAMILY_TABLE = ROOT / "models/families/table.py"


def family_keys() -> set[str]:
    """Model types that are literals of the family table."""
    tree = ast.parse(FAMILY_TABLE.read_text())
    (table,) = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and node.target.id == "FAMILIES"
    ]
    return {str(key.value) for key in table.keys if isinstance(key, ast.Constant)}


def strings(source: str) -> set[str]:
    constants = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    return {value for value in constants if isinstance(value, str)}


def test_one_table_names_the_families_of_mixtures_of_experts():
    keys = family_keys()
    assert len(keys) > 6 and "mixtral" in keys
    found = {name_of(path) for path in HOUSE if keys & strings(path.read_text())}
    # A format of exports bears the name of its family.
    assert found - {"configs/choices.py"} == {name_of(FAMILY_TABLE)}


REMOTE_CODE = sorted((ROOT / "models").rglob("*_fedgraft.py"))


def test_the_code_that_travels_with_a_checkpoint_is_found():
    assert {path.name for path in REMOTE_CODE} >= {"configuration_fedgraft.py", "modeling_fedgraft.py"}
    assert len({path.parent for path in REMOTE_CODE}) == 1


@pytest.mark.parametrize("path", REMOTE_CODE, ids=name_of)
def test_what_travels_with_a_checkpoint_needs_torch_and_transformers_only(path):
    for level, name in imports(path.read_text()):
        if level:
            sibling = path.with_name(f"{name}.py")
            assert level == 1 and name.endswith("_fedgraft") and sibling.is_file(), f"{'.' * level}{name}"
        else:
            top = name.partition(".")[0]
            assert top in CHECKPOINT_LIBRARIES or top in sys.stdlib_module_names, name


def test_configurations_import_nothing_heavy():
    heavy = {"torch", "transformers", "datasets", "flwr", "tensorboard", "gradio"}
    found = list((ROOT / "configs").rglob("*.py"))
    assert len(found) > 5
    for path in found:
        assert not {name.partition(".")[0] for _, name in imports(path.read_text())} & heavy, path.name


@pytest.mark.parametrize("path", tracked(), ids=name_of)
def test_no_file_names_a_path_of_some_machine(path):
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        pytest.skip("not text")
    found = [match.group() for match in MACHINE_PATH.finditer(text)]
    assert path == Path(__file__) or found == []


def test_paths_of_machines_are_recognized():
    for line in ("cd /work/main", "'/root/x'", 'open("/tmp/w/log")', "path=/work/x-1", "/Users/me/x"):
        assert MACHINE_PATH.search(line), line
    for line in (
        "~/work/x",
        "a/work/main",
        "https://example.org/home/page",
        "/tmp/pytest",
        "$HOME/work",
        "/work",
    ):
        assert not MACHINE_PATH.search(line), line


@pytest.mark.parametrize(
    "path", [path for path in HOUSE if path.name != "__init__.py" and "/" in name_of(path)], ids=name_of
)
def test_every_module_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_text())), f"{name_of(path)} has no docstring"


OPTION = re.compile(r"(?<![\w-])--[a-z]")
COMMAND = re.compile(r"`\w+ [^`]*`")


def raised_options(source: str) -> list[str]:
    """Messages of raised errors that name an option of the command line, outside of a command in backquotes."""
    raised = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Raise)]
    texts = [
        "".join(str(part.value) for part in ast.walk(node) if isinstance(part, ast.Constant))
        for node in raised
    ]
    return [text for text in texts if OPTION.search(COMMAND.sub("", text))]


@pytest.mark.parametrize(
    "path", [path for path in HOUSE if path.relative_to(ROOT).parts[0] != "scripts"], ids=name_of
)
def test_libraries_name_fields_and_no_options(path):
    assert raised_options(path.read_text()) == []


def test_options_in_messages_are_recognized():
    assert raised_options('raise UserError(f"got {path}; pass --overwrite")') == ["got ; pass --overwrite"]
    assert raised_options('raise UserError("make one with `fedgraft bootstrap --out DIR`; a--b")') == []
    assert raised_options('command = ["flwr", "--stream"]') == []


def option_helps(source: str) -> list[str]:
    """Help texts of the options that a module declares."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    options = [call for call in calls if ast.unparse(call.func) in ("typer.Option", "Option")]
    return [
        ast.unparse(keyword.value) for call in options for keyword in call.keywords if keyword.arg == "help"
    ]


def test_no_option_is_declared_twice():
    helps = Counter(
        text
        for path in HOUSE
        if path.is_relative_to(ROOT / "scripts")
        for text in option_helps(path.read_text())
    )
    assert len(helps) > 40
    assert [text for text, count in helps.items() if count > 1] == []


def test_every_option_of_a_verb_is_explained():
    for verb, command in loaded_commands(fedgraft.VERBS).items():
        options = [each for each in command.params if isinstance(each, click.Option)]
        assert [each.name for each in options if not each.help] == [], verb


def loaded_commands(verbs) -> dict[str, click.Command]:
    """Commands by their full name, sub-commands in place of groups."""
    found: dict[str, click.Command] = {}
    for name, verb in verbs.items():
        command = verb.load(name)
        inside = getattr(command, "commands", None)
        found |= {f"{name} {each}": inside[each] for each in inside} if inside else {name: command}
    return found


def test_declarations_of_options_are_recognized():
    source = (
        'A = Annotated[int, typer.Option("--a", help="Some.")]\ndef f(b=typer.Option(help=f"{A} more.")): ...'
    )
    assert sorted(option_helps(source)) == ["'Some.'", "f'{A} more.'"]
    assert option_helps("parser.add_argument('--a', help='Some.')") == []


UNPICKLING = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
UNPICKLING_CALLS = {"torch.load", "joblib.load", "pd.read_pickle", "pandas.read_pickle", "yaml.load"}


def unpickled(source: str) -> list[str]:
    """Imports and calls of a module that run code out of the data that they read."""
    tree = ast.parse(source)
    imported = {name.partition(".")[0] for _, name in imports(source)} & UNPICKLING
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = {ast.unparse(call.func) for call in calls} & UNPICKLING_CALLS
    allowed = [
        "allow_pickle"
        for call in calls
        for keyword in call.keywords
        if keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False"
    ]
    return sorted(imported | names) + allowed


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_module_unpickles(path):
    assert unpickled(path.read_text()) == []


def test_unpickling_is_recognized():
    source = "import pickle\nx = torch.load(f)\nnp.load(f, allow_pickle=True)\nnp.load(g, allow_pickle=False)"
    assert unpickled(source) == ["pickle", "torch.load", "allow_pickle"]
    assert unpickled("from cloudpickle import loads\njson.load(f)") == ["cloudpickle"]
