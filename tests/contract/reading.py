"""vLLM's sources, read and never imported: from an installed package or from a wheel."""

import ast
import importlib.util
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from server.engine.contract import Taken

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Sources:
    """Modules of one version of vLLM.

    Args:
        read: Path below the package's parent -> text; None where there is no such file.
    """

    def __init__(self, read: Callable[[str], str | None]) -> None:
        self._read = cache(read)
        self._trees: dict[str, tuple[ast.Module, bool] | None] = {}

    @classmethod
    def installed(cls) -> "Sources":
        """Of the environment that this runs in."""
        spec = importlib.util.find_spec("vllm")
        assert spec is not None
        assert spec.origin is not None
        root = Path(spec.origin).parent.parent
        return cls(lambda name: (root / name).read_text(encoding="utf-8") if (root / name).is_file() else None)

    @classmethod
    def wheel(cls, path: Path) -> "Sources":
        """Of a wheel, which is a zip file."""
        archive = zipfile.ZipFile(path)
        names = set(archive.namelist())
        return cls(lambda name: archive.read(name).decode("utf-8") if name in names else None)

    def module(self, name: str) -> tuple[ast.Module, bool] | None:
        """A module's tree, and whether it is a package."""
        if name not in self._trees:
            path, found = name.replace(".", "/"), None
            for file, package in ((f"{path}.py", False), (f"{path}/__init__.py", True)):
                if (text := self._read(file)) is not None:
                    found = ast.parse(text), package
            self._trees[name] = found
        return self._trees[name]

    def find(self, module: str, name: str, depth: int = 0) -> tuple[str, ast.AST] | None:
        """The module that defines a name which another one knows, and where; followed through imports."""
        if depth > 8 or (found := self.module(module)) is None:
            return None
        tree, package = found
        last: tuple[str, ast.AST] | None = None
        for node in _statements(tree.body):
            if _defines(node, name):
                last = module, node
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if alias.name == "*":
                        last = last or self._imported(module, package, node, name, depth, strange=False)
                    elif (alias.asname or alias.name) == name:
                        last = self._imported(module, package, node, alias.name, depth) or last
        if last is None and self.module(f"{module}.{name}") is not None:
            return f"{module}.{name}", ast.Module([], [])
        return last or self._lazily(module, tree, name, depth)

    def _imported(
        self, module: str, package: bool, node: ast.ImportFrom, name: str, depth: int, *, strange: bool = True
    ) -> tuple[str, ast.AST] | None:
        home = node.module or ""
        if node.level:
            base = module.split(".") if package else module.split(".")[:-1]
            base = base[: len(base) - node.level + 1]
            home = ".".join([*base, home] if home else base)
        if home.split(".")[0] != "vllm":
            return (home, node) if strange else None
        return self.find(home, name, depth + 1)

    def _lazily(self, module: str, tree: ast.Module, name: str, depth: int) -> tuple[str, ast.AST] | None:
        """Names that a module's `__getattr__` finds in a table of texts, or in one of environment variables."""
        for node in ast.walk(tree):
            if isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == name:
                        if isinstance(value, ast.Constant) and ":" in str(value.value):
                            home, _, real = str(value.value).partition(":")
                            return self.find(module + home if home.startswith(".") else home, real, depth + 1)
                        return module, node
        return None

    def member(self, module: str, cls: ast.ClassDef, name: str, depth: int = 0) -> tuple[str, ast.AST] | None:
        """A member of a class or of those it inherits from."""
        for node in _statements(cls.body):
            if _defines(node, name):
                return module, node
        for node in ast.walk(cls):
            if isinstance(node, ast.Assign | ast.AnnAssign) and f"self.{name}" in _targets(node):
                return module, node
        for base in cls.bases if depth < 8 else ():
            named = ast.unparse(base).partition("[")[0]
            found = self.find(module, named.rpartition(".")[2]) or self._of_module(module, named)
            if found and isinstance(found[1], ast.ClassDef) and (it := self.member(*found, name, depth + 1)):
                return it
        return None

    def _of_module(self, module: str, dotted: str) -> tuple[str, ast.AST] | None:
        first, _, rest = dotted.partition(".")
        found = self.find(module, first)
        return self.find(found[0], rest) if found and rest else None

    def place(self, place: str) -> tuple[str, ast.AST] | None:
        """What a `Taken.place` names."""
        home, _, name = place.partition(":")
        first, _, rest = name.partition(".")
        found = self.find(f"vllm.{home}" if home else "vllm", first)
        if found is None or not rest:
            return found
        return self.member(*found, rest) if isinstance(found[1], ast.ClassDef) else None


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements, those inside of `if`, `try` and `with` too."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            for part in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, part, []))
        for handler in getattr(node, "handlers", []):
            yield from _statements(handler.body)


def _defines(node: ast.stmt, name: str) -> bool:
    if isinstance(node, ast.Assign | ast.AnnAssign):
        return name in _targets(node)
    return isinstance(node, Function | ast.ClassDef) and node.name == name


def _targets(node: ast.Assign | ast.AnnAssign) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [ast.unparse(each) for target in targets for each in getattr(target, "elts", [target])]


def breaches(sources: Sources, contract: tuple[Taken, ...]) -> list[str]:
    """What a version does not keep of the contract, a line each."""
    return [f"{taken.place}: {reason}" for taken in contract if (reason := breach(sources, taken)) is not None]


def breach(sources: Sources, taken: Taken) -> str | None:
    """How a version breaks what is relied on of one name; None: it does not."""
    found = sources.place(taken.place) or (sources.place(taken.moved) if taken.moved else None)
    if found is None:
        return "there is no such name"
    home, node = found
    if (
        isinstance(node, ast.ClassDef)
        and taken.positional is not None
        and (it := sources.member(home, node, "__init__"))
    ):
        node = it[1]
    if taken.looks_up:
        used = {getattr(each, "id", getattr(each, "attr", None)) for each in ast.walk(node)}
        if missing := [name for name in taken.looks_up if not used & set(name.split("|"))]:
            return f"does not look {missing[0]} up"
    if taken.positional is None and taken.exact is None:
        return None
    if not isinstance(node, Function):
        return None if home.split(".")[0] != "vllm" else "is no function"
    return _signature(node, taken)


def _signature(node: Function, taken: Taken) -> str | None:
    """How a function cannot be called, or overridden, as it is."""
    static = any("staticmethod" in ast.unparse(each) for each in node.decorator_list)
    given = node.args
    names = [each.arg for each in (*given.posonlyargs, *given.args)]
    own = 1 if names[:1] in (["self"], ["cls"]) and not static else 0
    names = names[own:]
    keyword = [each.arg for each in given.kwonlyargs]
    if taken.exact is not None:
        if tuple(names + keyword) != taken.exact:
            return f"has the parameters ({', '.join(names + keyword)}), not ({', '.join(taken.exact)})"
        return None
    if len(names) < (taken.positional or 0) and given.vararg is None:
        return f"takes {len(names)} arguments, not {taken.positional}"
    if given.kwarg is None and (unknown := [each for each in taken.keywords if each not in names + keyword]):
        return f"has no parameter {unknown[0]}"
    needed = names[: len(names) - len(given.defaults)][taken.positional or 0 :]
    needed += [name for name, default in zip(keyword, given.kw_defaults, strict=True) if default is None]
    missing = [each for each in needed if each not in taken.keywords]
    partial = "__init__" in taken.place and taken.place.count("LlamaForCausalLM")
    return f"needs {missing[0]} too" if missing and not partial else None
