"""The plan of the house, enforced: who imports whom, how large things may be, what may not appear.

A rule takes one parsed file and yields (line, message); a failure lists every `file:line: message` of the package.
"""

from __future__ import annotations

import ast
import io
import itertools
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "segvit"

BRICKS = {"nn", "metrics", "data", "text"}
PARTS = {"nn", "losses", "backbones", "adapters", "text"}
MIDDLE = PARTS | BRICKS | {"systems", "zoo", "model_folder", "inference", "engine"}
TOP = {"tasks", "export", "serve", "bench"}
MAY_IMPORT = {
    **{folder: set() for folder in BRICKS},
    "losses": {"nn"},
    "backbones": {"nn"},
    "adapters": {"nn", "backbones", "text"},
    "systems": PARTS,
    "zoo": {"systems", "backbones", "adapters"},
    "model_folder": {"zoo", "adapters"},
    "inference": {"nn", "data"},
    "engine": {"data", "metrics", "inference"},
    **dict.fromkeys(TOP, MIDDLE),
    **{door: MIDDLE | TOP | {"cli", "__init__"} for door in ("cli", "__init__", "__main__")},
    "contracts": set(),
    "files": set(),
    "palette": set(),
}
MAY_ALSO_IMPORT = {"backbones/clip.py": {"text"}}
STRANGERS = {"systems"}  # folders whose files never import each other

CORE = {
    "torch", "torchvision", "timm", "accelerate", "safetensors", "huggingface_hub", "numpy", "scipy", "PIL", "yaml",
    "jsonargparse", "rich",
}  # fmt: skip
OUTER = ("export", "serve", "bench", "text", "backbones/clip.py")
OPTIONAL = {  # module -> the folders or files that may import it
    **dict.fromkeys(["open_clip", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf", "fvcore"], OUTER),
    **dict.fromkeys(["fastapi", "starlette", "uvicorn", "multipart", "prometheus_client"], OUTER),
    **dict.fromkeys(["ray", "webdataset"], ("data", "bench")),
    **dict.fromkeys(["av", "nibabel", "tifffile"], ("data", "inference")),
    **dict.fromkeys(["pycocotools", "py_sod_metrics", "faiss"], ("data", "metrics", "tasks")),
    **dict.fromkeys(["tensorboard", "wandb", "mlflow"], ("engine",)),
    "segmentation_models_pytorch": ("systems/classic.py", "bench"),
    "transformers": ("bench",),
}
EAGER_OPTIONAL = {"export", "serve", "bench"}  # folders that nothing else imports unasked: module level is fine there
DOORS = {
    f"cli/{name}.py"
    for name in (
        "__init__", "adapters", "clip", "parsing", "run", "data", "models", "classify", "compare", "few_shot",
        "retrieve", "export", "bench",
    )
}  # fmt: skip
WITHOUT_TORCH = {"__init__.py", "__main__.py", "contracts.py", *DOORS}

FILE_LINES, FUNCTION_LINES, CLASS_LINES, PARAMETERS, NESTING = 400, 60, 200, 8, 4
LONG_FILES = {  # path in the package -> why it may have up to LONG_FILE_LINES
    "systems/segvit.py": "the paper's two networks, its loss and both official layouts belong in one file",
    "systems/few_shot.py": "PFENet, BAM and its base learner share one matcher, one criterion and one official layout",
}
LONG_FILE_LINES = 500
DUPLICATE_SHARE, DUPLICATE_MIN_LINES = 0.01, 6
CLOSURE_FILES, CLOSURE_LINES = 14, 2200
LONG_CLOSURES = dict.fromkeys(  # path in the package -> why its reader may have to open up to LONG_CLOSURE_FILES
    ("systems/zegclip.py", "systems/denseclip.py", "systems/zsseg.py", "systems/dpt_clip.py"),
    "an image tower, a text tower and their checkpoints come before the system itself",
)
LONG_CLOSURE_FILES, LONG_CLOSURE_LINES = 24, 3300
VAGUE_NAMES = {"util", "utils", "misc", "common", "helper", "helpers"}

Function = ast.FunctionDef | ast.AsyncFunctionDef
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)
Finding = tuple[int, str]


class Source(NamedTuple):
    """One file of the package."""

    path: str  # inside the package, with forward slashes
    text: str
    tree: ast.Module

    @property
    def folder(self) -> str:
        """What the import table calls it: the folder, or the name of a top-level file."""
        return self.path.split("/")[0].removesuffix(".py")

    @property
    def lines(self) -> int:
        return len(self.text.splitlines())


class Import(NamedTuple):
    """One imported thing: `from a import b` counts as a.b."""

    line: int
    module: str
    name: str  # "" for `import a`
    alias: str  # the name that it binds here
    top_level: bool  # executed when the file is imported


def parse(path: str, text: str) -> Source:
    return Source(path, text, ast.parse(text))


@cache
def sources() -> tuple[Source, ...]:
    base = ROOT / PACKAGE
    paths = sorted(path.relative_to(base).as_posix() for path in base.rglob("*.py"))
    return tuple(parse(path, (base / path).read_text(encoding="utf-8")) for path in paths)


# Reading imports


def imports(source: Source) -> Iterator[Import]:
    """Every import of a file: at module level, inside functions, under TYPE_CHECKING, by import_module("...")."""
    eager = {id(node) for node in eager_nodes(source.tree.body)}
    for node in ast.walk(source.tree):
        top = id(node) in eager
        match node:
            case ast.Import(names=names):
                yield from (Import(node.lineno, n.name, "", (n.asname or n.name).split(".")[0], top) for n in names)
            case ast.ImportFrom(names=names):
                module = absolute(source.path, node.module or "", node.level)
                yield from (Import(node.lineno, module, n.name, n.asname or n.name, top) for n in names)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                level = len(name) - len(name.lstrip("."))
                yield Import(node.lineno, absolute(source.path, name.lstrip("."), level), "", "", False)


def eager_nodes(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when the file is imported."""
    for node in body:
        yield node
        if isinstance(node, FUNCTIONS) or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            continue
        for child in ("body", "orelse", "finalbody"):
            yield from eager_nodes(getattr(node, child, []))
        yield from itertools.chain.from_iterable(eager_nodes(h.body) for h in getattr(node, "handlers", []))


def absolute(path: str, module: str, level: int) -> str:
    """The full name of a module imported by the file at `path`, `level` dots up."""
    if not level:
        return module
    folders = [PACKAGE, *path.split("/")[:-1]]
    return ".".join([*folders[: len(folders) - level + 1], *filter(None, [module])])


def first_party(source: Source) -> Iterator[tuple[Import, str]]:
    """Imports of ours with the file that each leads to; `__version__` may be read from anywhere."""
    existing = {other.path for other in sources()} | {source.path}
    for item in imports(source):
        if item.module.split(".")[0] == PACKAGE and item.name != "__version__":
            yield item, target(item, existing)


def target(item: Import, existing: set[str]) -> str:
    """The file that an import of ours leads to; the guess `<module>.py` if there is none."""
    modules = [f"{item.module}.{item.name}"] if item.name else []
    for module in [*modules, item.module]:
        path = "/".join(module.split(".")[1:])
        for candidate in (f"{path}.py", f"{path}/__init__.py".lstrip("/")):
            if candidate in existing:
                return candidate
    return "/".join(item.module.split(".")[1:]) + ".py"


def third_party(source: Source) -> Iterator[Import]:
    known = sys.stdlib_module_names | {PACKAGE}
    return (item for item in imports(source) if item.module.split(".")[0] not in known)


# Rules about imports


def import_table(source: Source) -> Iterator[Finding]:
    """Design, section 2: a folder imports only what the table allows, besides the contracts and itself."""
    allowed = MAY_IMPORT.get(source.folder)
    if allowed is None:
        yield 1, f"{source.folder} is not in the import table of tests/test_architecture.py"
        return
    allowed = allowed | MAY_ALSO_IMPORT.get(source.path, set()) | {"contracts", "files", "palette"}
    for item, path in first_party(source):
        folder = path.split("/")[0].removesuffix(".py")
        if folder == source.folder:
            if folder in STRANGERS and path not in (source.path, f"{folder}/__init__.py"):
                yield item.line, f"{folder} never import each other, but this imports {path}"
        elif folder not in allowed:
            yield item.line, f"{source.folder} may not import {folder} ({path})"


def dependencies(source: Source) -> Iterator[Finding]:
    """Only declared packages; optional ones in their places, and lazily where the core would meet them."""
    for item in third_party(source):
        module = item.module.split(".")[0]
        places = OPTIONAL.get(module)
        if module in CORE:
            continue
        if places is None:
            yield item.line, f"{module} is neither a core nor an optional dependency"
        elif source.folder not in places and source.path not in places:
            yield item.line, f"{module} is optional and may be imported only in {', '.join(places)}"
        elif item.top_level and source.folder not in EAGER_OPTIONAL:
            yield item.line, f"{module} is optional: import it inside the function that needs it"


def no_torch_at_the_door(source: Source) -> Iterator[Finding]:
    """The command line and the contracts can be imported without torch."""
    for item in third_party(source):
        if source.path in WITHOUT_TORCH and item.top_level and item.module.split(".")[0].startswith("torch"):
            yield item.line, "imports torch at module level"


# Rules about size and shape


def file_lines(source: Source) -> Iterator[Finding]:
    limit = LONG_FILE_LINES if source.path in LONG_FILES else FILE_LINES
    if source.lines > limit:
        yield limit, f"{source.lines} lines, allowed {limit}"


def function_and_class_lines(source: Source) -> Iterator[Finding]:
    for node in ast.walk(source.tree):
        if not isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            continue
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        limit = CLASS_LINES if isinstance(node, ast.ClassDef) else FUNCTION_LINES
        if lines > limit:
            yield node.lineno, f"{node.name} has {lines} lines, allowed {limit}"


def parameters(source: Source) -> Iterator[Finding]:
    """Keyword-only parameters, self and cls are free."""
    for node in ast.walk(source.tree):
        if isinstance(node, FUNCTIONS):
            names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
            count = len(names) - (names[:1] in (["self"], ["cls"]))
            if count > PARAMETERS:
                yield node.lineno, f"{node.name} has {count} parameters that are not keyword-only, allowed {PARAMETERS}"


def nesting(source: Source) -> Iterator[Finding]:
    """Blocks within blocks of a function; `elif` continues its `if`, a nested function goes on counting."""
    for function in own_functions(source.tree.body):
        deepest, line = max(depths(function.body, 0), default=(0, 0))
        if deepest > NESTING:
            yield line, f"{function.name} nests {deepest} blocks, allowed {NESTING}"


def depths(body: list[ast.stmt], depth: int) -> Iterator[tuple[int, int]]:
    for node in body:
        inner = depth + isinstance(node, (*BLOCKS, *FUNCTIONS))
        yield inner, node.lineno
        for name in ("body", "orelse", "finalbody"):
            children = getattr(node, name, [])
            elif_ = name == "orelse" and isinstance(node, ast.If) and [type(c) for c in children] == [ast.If]
            yield from depths(children, depth if elif_ else inner)
        for branch in (*getattr(node, "handlers", []), *getattr(node, "cases", [])):
            yield from depths(branch.body, inner)


def own_functions(body: list[ast.stmt]) -> Iterator[Function]:
    """Functions and methods of a file, without those nested in other functions."""
    for node in body:
        if isinstance(node, FUNCTIONS):
            yield node
        else:
            yield from own_functions([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)])


def inheritance(source: Source) -> Iterator[Finding]:
    """No class derives from a class of ours, except exceptions."""
    ours = {item.alias for item, _ in first_party(source)}
    ours |= {node.name for node in ast.walk(source.tree) if isinstance(node, ast.ClassDef)}
    for node in ast.walk(source.tree):
        for base in node.bases if isinstance(node, ast.ClassDef) else []:
            written = ast.unparse(base).split("[")[0]
            if written.split(".")[0] in ours and not written.endswith(("Error", "Exception", "Warning")):
                yield node.lineno, f"{node.name} derives from our own {written}"


def no_probing(source: Source) -> Iterator[Finding]:
    """Attributes are known, not looked for."""
    for node in ast.walk(source.tree):
        match node:
            case ast.Call(func=ast.Name(id="hasattr")):
                yield node.lineno, "hasattr probes for an attribute"
            case ast.Call(func=ast.Name(id="getattr"), args=[_, ast.Constant(), _]):
                yield node.lineno, "getattr with a literal name and a default probes for an attribute"


# Rules about names and text


def telling_names(source: Source) -> Iterator[Finding]:
    for word in VAGUE_NAMES.intersection(re.split(r"[/_.]", source.path)):
        yield 1, f"a file name that says nothing: {word}"


def docstrings(source: Source) -> Iterator[Finding]:
    """Every file that holds something, and every public top-level function and class, says what it is."""
    if source.text.strip() and not ast.get_docstring(source.tree):
        yield 1, "no module docstring"
    for node in source.tree.body:
        named = isinstance(node, (*FUNCTIONS, ast.ClassDef))
        if named and not node.name.startswith("_") and not ast.get_docstring(node):
            yield node.lineno, f"{node.name} has no docstring"


RULES = [
    import_table, dependencies, no_torch_at_the_door, file_lines, function_and_class_lines, parameters, nesting,
    inheritance, no_probing, telling_names, docstrings,
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule):
    found = [f"{PACKAGE}/{source.path}:{line}: {why}" for source in sources() for line, why in rule(source)]
    assert not found, "\n" + "\n".join(dict.fromkeys(found))


def test_long_files_have_a_reason_and_exist():
    assert all(LONG_FILES.values())
    assert set(LONG_FILES) <= {source.path for source in sources() if source.lines > FILE_LINES}


# Rules about the whole package


def closure(start: str, known: dict[str, Source]) -> set[str]:
    """The files to read for understanding `start`, itself included; empty files are not read."""
    seen: set[str] = set()
    todo = [start]
    while todo:
        path = todo.pop()
        if path in known and path not in seen and known[path].text.strip():
            seen.add(path)
            todo.extend(other for _, other in first_party(known[path]))
    return seen


SYSTEMS = [source.path for source in sources() if source.folder == "systems" and source.text.strip()]


@pytest.mark.parametrize("path", SYSTEMS)
def test_reading_closure(path):
    known = {source.path: source for source in sources()}
    files = sorted(closure(path, known))
    lines = sum(known[file].lines for file in files)
    listing = "\n".join(f"{known[file].lines:5d} {PACKAGE}/{file}" for file in files)
    long = path in LONG_CLOSURES
    assert len(files) <= (LONG_CLOSURE_FILES if long else CLOSURE_FILES), f"{len(files)} files:\n{listing}"
    assert lines <= (LONG_CLOSURE_LINES if long else CLOSURE_LINES), f"{lines} lines:\n{listing}"


class Body(NamedTuple):
    """A function without its docstring."""

    where: str
    lines: int
    tokens: str


def bodies(source: Source) -> Iterator[Body]:
    lines = source.text.splitlines(keepends=True)
    for function in own_functions(source.tree.body):
        statements = function.body[1:] if ast.get_docstring(function) is not None else function.body
        if statements and statements[0].lineno > function.lineno:
            start, end = statements[0].lineno, statements[-1].end_lineno or 0
            text = tokens("".join(lines[start - 1 : end]))
            yield Body(f"{PACKAGE}/{source.path}:{start}: {function.name}", end - start + 1, text)


def tokens(text: str) -> str:
    """The code's tokens, one a line, without comments and layout."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    wrapped = io.StringIO("if 1:\n" + text).readline if text[:1].isspace() else io.StringIO(text).readline
    words = [token.string for token in tokenize.generate_tokens(wrapped) if token.type not in layout]
    return "\n" + "\n".join(words[3:] if text[:1].isspace() else words) + "\n"


def duplicates(found: list[Body]) -> list[Body]:
    """Bodies of some length that appear token for token in another function."""
    everything = "\0".join(body.tokens for body in found)
    return [body for body in found if body.lines >= DUPLICATE_MIN_LINES and everything.count(body.tokens) > 1]


def test_duplication():
    found = [body for source in sources() for body in bodies(source)]
    copies = duplicates(found)
    share = sum(body.lines for body in copies) / max(1, sum(body.lines for body in found))
    assert share < DUPLICATE_SHARE, f"{share:.1%} of all function lines\n" + "\n".join(body.where for body in copies)


# Rules about every committed text file

HOSTS = ["pypi" + ".org", "python" + "hosted.org", "download." + "pytorch.org", "anaconda" + ".org", "conda" + ".io"]
SETTINGS = [r"(?:extra-)?index" + "[-_]url", "find" + "[-_]links", "trusted" + "[-_]host"]
MACHINE_PATH = r"(?<![\w./-])/(?:home|root|Users|work)/\w"
FORBIDDEN = re.compile("|".join([*map(re.escape, HOSTS), rf"(?:{'|'.join(SETTINGS)})[=:\s]+\S", MACHINE_PATH]))
LOCK_FILES = {"uv.lock", "poetry.lock", "Pipfile.lock", "pdm.lock", "conda-lock.yml"}


def committed_files() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in sorted(filter(None, listed.split("\0"))) if (ROOT / name).is_file()]


def test_committed_text_names_no_registry_and_no_machine_path():
    found = []
    for path in committed_files():
        content = path.read_bytes()
        if b"\0" in content:
            continue
        for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
            if match := FORBIDDEN.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match.group()}")
    assert not found, "\n" + "\n".join(dict.fromkeys(found))


def test_no_lock_file_of_a_registry():
    assert not [path for path in committed_files() if path.name in LOCK_FILES]


# The rules themselves


def block(lines: int, indent: str = "    ") -> str:
    return "\n".join(f"{indent}x{i} = {i}" for i in range(lines))


BAD = [
    (import_table, "nn/a.py", "from segvit.losses.dice import dice_loss"),
    (import_table, "nn/a.py", "def f():\n    from ..data import prepare"),
    (import_table, "systems/a.py", "if TYPE_CHECKING:\n    from .segvit import SegViT"),
    (import_table, "backbones/a.py", "import importlib\nm = importlib.import_module('segvit.systems.segvit')"),
    (import_table, "zoo.py", "from segvit import load"),
    (import_table, "elsewhere/a.py", ""),
    (dependencies, "nn/a.py", "import cv2"),
    (dependencies, "engine/a.py", "def f():\n    import onnxruntime as ort"),
    (dependencies, "text/a.py", "try:\n    from open_clip import tokenize\nexcept ImportError:\n    pass"),
    (no_torch_at_the_door, "cli/run.py", "from torch.nn import functional"),
    (file_lines, "nn/a.py", "\n" * 401),
    (function_and_class_lines, "nn/a.py", "def f():\n" + block(60)),
    (function_and_class_lines, "nn/a.py", "class A:\n" + block(200)),
    (parameters, "nn/a.py", "def f(a, b, c, d, e, f, g, h, i): ..."),
    (nesting, "nn/a.py", "def f():\n if a:\n  for b in c:\n   with d:\n    try: ...\n    except e:\n     if g: ..."),
    (inheritance, "nn/a.py", "class A: ...\nclass B(A): ..."),
    (inheritance, "losses/a.py", "from segvit.nn import attention\nclass B(attention.Attention[int]): ..."),
    (no_probing, "nn/a.py", "hasattr(a, 'b')"),
    (no_probing, "nn/a.py", "getattr(a, 'b', None)"),
    (telling_names, "nn/image_utils.py", ""),
    (docstrings, "nn/a.py", "x = 1"),
    (docstrings, "nn/a.py", "'''A file.'''\ndef f(): ..."),
]
GOOD = """'''A file.'''
from segvit.contracts import Features, UserError
from segvit import __version__
from torch import nn

class Lost(UserError):
    '''Ours, but an exception.'''

class A(nn.Module):
    '''A class.'''

    def forward(self, a, b, c, d, e, f, g, h, *, i, j):
        if a: ...
        elif b: ...
        elif c: ...
        elif d: ...
        elif e:
            getattr(f, g, h)
"""


@pytest.mark.parametrize(("rule", "path", "code"), [pytest.param(*bad, id=bad[0].__name__) for bad in BAD])
def test_rule_finds_what_is_wrong(rule, path, code):
    assert list(rule(parse(path, code)))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_accepts_what_is_right(rule):
    assert not list(rule(parse("nn/a.py", GOOD)))


def test_duplicates_are_found_whatever_their_layout():
    first = "def f():\n    '''One.'''\n" + block(6)
    second = "class A:\n    def g(self):\n        y = 1  # more\n" + block(6, " " * 8)
    found = [*bodies(parse("nn/a.py", first)), *bodies(parse("nn/b.py", second))]
    assert [body.where for body in duplicates(found)] == ["segvit/nn/a.py:3: f"]
    assert not duplicates(list(bodies(parse("nn/a.py", first.replace("x5", "y5") + "\n" + second))))
