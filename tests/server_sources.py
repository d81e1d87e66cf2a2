"""The table of servers held against a server's own source, read and never run.

``python -m tests.server_sources vllm DIR`` reads the unpacked wheel of a server (``pip download --no-deps vllm``, then
``unzip``), and prints where it says otherwise than `pytest_nullspace.judging.servers`. It ends with 1 where it does. Of
llama.cpp and TGI it reads a checkout; of the former one lies in the source of ``llama-cpp-python``.
"""

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from pytest_nullspace.judging import serve_names, serve_scales, servers

MAPPER = "hf_to_vllm_mapper"
QUOTED = re.compile("“([^”]+)”")
SOURCES = {
    "vllm": ("vllm/lora", "vllm/config/lora.py"),
    "sglang": ("sglang/srt/lora",),
    "tgi": ("server/text_generation_server/adapters", "server/text_generation_server/utils/adapter.py"),
    "llama.cpp": ("convert_lora_to_gguf.py",),
}
"""Where a server's rules of adapters are written."""


def differences(server: str, folder: Path) -> Iterator[str]:
    """All in which a server's source says otherwise than the table.

    Args:
        server: A key of `SOURCES`.
        folder: Where its wheel was unpacked, or its checkout.
    """
    files = [file for part in SOURCES[server] for file in _files(folder / part)]
    said = _plain(" ".join([*_texts(files), *(file.read_text("utf-8") for file in folder.glob("src/llama-adapter.*"))]))
    for rule in servers.rules_of(server):
        if rule.until:
            continue
        for quoted in QUOTED.findall(rule.says):
            if _plain(quoted) not in said:
                yield f"rule {rule.name}: no text of the source says “{quoted}”"
    if server == "vllm":
        yield from _vllm(folder / "vllm")
    elif server == "sglang":
        yield from _sglang(folder / "sglang/srt")
    else:
        yield from (_tgi if server == "tgi" else _llama_cpp)(folder, "".join(file.read_text("utf-8") for file in files))


def _vllm(package: Path) -> Iterator[str]:
    models = Models(package / "model_executor/models")
    for architecture in (*servers.VLLM_PLAIN, *servers.VLLM_WRAPPERS, *servers.VLLM_WITHOUT):
        place = models.registered.get(architecture)
        if place is None:
            if architecture not in servers.VLLM_WITHOUT:
                yield f"{architecture}: no such class is registered"
            continue
        takes = "SupportsLoRA" in models.bases(*place)
        if takes == (architecture in servers.VLLM_WITHOUT):
            yield f"{architecture}: {'takes' if takes else 'takes no'} adapters"
        elif takes and not place[0].startswith("transformers"):  # where every name is that of the library's own class
            yield from _renamed(architecture, models.prefixes(*place))
    ranks = _assigned(_tree(package / "config/lora.py"), "MaxLoRARanks")
    known = tuple(of.value for of in ast.walk(ranks) if isinstance(of, ast.Constant)) if ranks is not None else ()
    if known != servers.VLLM_RANKS:
        yield f"max_lora_rank takes {known}, not {servers.VLLM_RANKS}"


def _renamed(architecture: str, theirs: Mapping[str, str] | None) -> Iterator[str]:
    """Where a class puts other prefixes into the names of modules than the table."""
    ours = servers.VLLM_WRAPPERS.get(architecture, {})
    if theirs is None:
        yield f"{architecture}: its prefixes are no plain dictionary, so nobody read them"
        return
    for prefix in dict.fromkeys(["model.language_model.", *theirs]):  # the table has one for classes of several kinds
        name = f"{prefix}layers.0.self_attn.q_proj" if prefix.endswith("model.") else f"{prefix}0.proj"
        one, other = serve_names.mapped(name, ours), serve_names.mapped(name, theirs)
        if one != other:
            yield f"{architecture}: {name} is looked for as {other}, in the table as {one}"


def _sglang(package: Path) -> Iterator[str]:
    text = " ".join(file.read_text("utf-8") for file in _files(package / "lora"))
    lost = [name for name in servers.SGLANG_MODULES if not re.search(rf"\b{name}\b", text)]
    if lost:
        yield f"no source names {', '.join(lost)}"
    for name in ("use_rslora", "alpha_pattern", "modules_to_save"):
        if name in text:
            yield f"{name} is read, which the table says it is not"


def _tgi(folder: Path, text: str) -> Iterator[str]:
    package = folder / "server/text_generation_server"
    for name in ("rank_pattern", "alpha_pattern"):
        if name in text:
            yield f"{name} is read, which the table says it is not"
    if "config.r = padded_rank" not in text:
        yield "the padded rank is not written into the config, by which later kinds of projections were scaled"
    sizes = (package / "utils/sgmv.py").read_text("utf-8")
    for name, value in (
        ("MIN_SGMV_RANK", serve_scales.TGI_LEAST_RANK),
        ("SGMV_BLOCK_SIZE", serve_scales.TGI_STEP),
    ):
        if f"{name} = {value}\n" not in sizes:
            yield f"{name} is not {value}"
    order = re.search(r"adapter_layers = \[(.*?)\]", (package / "models/__init__.py").read_text("utf-8"), re.DOTALL)
    named = tuple(re.findall(r"\w+", order[1])) if order is not None else ()
    if named != serve_scales.TGI_PROJECTIONS:
        yield f"projections are prepared in the order {named}, not {serve_scales.TGI_PROJECTIONS}"


def _llama_cpp(folder: Path, text: str) -> Iterator[str]:
    for name in ("use_rslora", "alpha_pattern", "rank_pattern"):
        if name in text:
            yield f"{name} is read, which the table says it is not"
    loading, scale = ((folder / f"src/llama-adapter.{kind}").read_text("utf-8") for kind in ("cpp", "h"))
    if not re.search(r'str_endswith\(name, "_norm\.weight"\)\) \{(\s*//.*)*\s*continue;', loading):
        yield "norms are not passed over when the file is loaded"
    if "alpha ? adapter_scale * alpha / rank : adapter_scale" not in scale:
        yield "the scale is not alpha over the rank, and 1 where alpha is 0"


class Models:
    """The classes of a package of models, by its sources."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.registered = dict(_registered(_tree(folder / "registry.py")))

    def bases(self, module: str, name: str) -> set[str]:
        """The names of all classes from which one comes."""
        found: set[str] = set()
        for base, place in self._parents(module, name):
            found |= {base} | (self.bases(*place) if place is not None else set())
        return found

    def prefixes(self, module: str, name: str) -> dict[str, str] | None:
        """What a class puts in place of the prefixes of its files; None where that cannot be read."""
        place = self._class(module, name)
        told = None if place is None else _assigned(place, MAPPER)
        if told is not None:
            return self._mapped(module, told)
        for _, parent in self._parents(module, name):
            if parent is not None and (found := self.prefixes(*parent)) != {}:
                return found
        return {}

    def _mapped(self, module: str, told: ast.expr) -> dict[str, str] | None:
        """The prefixes of an expression: a mapper, that of another class, or several joined."""
        if isinstance(told, ast.BinOp) and isinstance(told.op, ast.BitOr):
            both = [self._mapped(module, side) for side in (told.left, told.right)]
            return None if None in both else {old: new for of in both if of for old, new in of.items()}
        if isinstance(told, ast.Attribute) and told.attr == MAPPER and isinstance(told.value, ast.Name):
            where = self._where(module, told.value.id)
            return None if where is None else self.prefixes(*where)
        if not (isinstance(told, ast.Call) and isinstance(told.func, ast.Name) and told.func.id == "WeightsMapper"):
            return None
        given = next((word.value for word in told.keywords if word.arg == "orig_to_new_prefix"), None)
        try:
            found = {} if given is None else ast.literal_eval(given)
        except ValueError:
            return None
        return {old: new for old, new in found.items() if isinstance(new, str)}

    def _parents(self, module: str, name: str) -> list[tuple[str, tuple[str, str] | None]]:
        place = self._class(module, name)
        names = [of.id for of in place.bases if isinstance(of, ast.Name)] if place is not None else []
        return [(base, self._where(module, base)) for base in names]

    def _where(self, module: str, name: str) -> tuple[str, str] | None:
        """The module, and the name there, of a class that ``module`` names so."""
        tree = self._tree(module)
        if tree is None:
            return None
        if self._class(module, name) is not None:
            return module, name
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        package = module if self._file(module).name == "__init__.py" else module.rpartition(".")[0]
                        inside = f"{package}." if node.level and package else ""
                        return inside + node.module.rpartition("models.")[2], alias.name
        return None

    def _class(self, module: str, name: str) -> ast.ClassDef | None:
        tree = self._tree(module)
        nodes = ast.walk(tree) if tree is not None else ()
        return next((node for node in nodes if isinstance(node, ast.ClassDef) and node.name == name), None)

    def _tree(self, module: str) -> ast.Module | None:
        file = self._file(module)
        return _tree(file) if file.is_file() else None

    def _file(self, module: str) -> Path:
        place = self._folder / module.replace(".", "/")
        return place / "__init__.py" if place.is_dir() else place.with_name(f"{place.name}.py")


def _registered(tree: ast.Module) -> Iterator[tuple[str, tuple[str, str]]]:
    """Of each architecture the module and the class."""
    for table in ast.walk(tree):
        for name, value in zip(table.keys, table.values, strict=True) if isinstance(table, ast.Dict) else ():
            place = (
                [of.value for of in value.elts if isinstance(of, ast.Constant)] if isinstance(value, ast.Tuple) else []
            )
            if isinstance(name, ast.Constant) and len(place) == 2:
                yield str(name.value), (str(place[0]), str(place[1]))


def _assigned(tree: ast.Module | ast.ClassDef, name: str) -> ast.expr | None:
    """What a module or class assigns to ``name``."""
    for node in tree.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            assert isinstance(node, ast.Assign | ast.AnnAssign)
            return node.value
    return None


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"))


def _files(place: Path) -> list[Path]:
    return sorted(place.rglob("*.py")) if place.is_dir() else [place]


def _texts(files: list[Path]) -> Iterator[str]:
    """Every text of the sources, parts of one that are put together joined."""
    for file in files:
        for node in ast.walk(_tree(file)):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(of.value) for of in node.values if isinstance(of, ast.Constant))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def _plain(text: str) -> str:
    return re.sub(r"[\s.`()]+", " ", text)


if __name__ == "__main__":
    found = list(differences(sys.argv[1], Path(sys.argv[2])))
    print("\n".join(found) or "the source says what the table says")
    sys.exit(bool(found))
