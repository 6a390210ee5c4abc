"""The rules of the house as functions of source text, so that each can be tried on a planted violation.

Every function returns what is wrong, one sentence a violation, and an empty list for clean source.
"""

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HEAVY = {"accelerate", "datasets", "deepspeed", "diffusers", "peft", "torchmetrics", "transformers"}
MAY_IMPORT_HEAVY = {"data", "evaluation", "models", "rewards", "training"}
# A package imports those below it in this list, never one above.
ORDER = [
    "cli",
    "stages",
    "evaluation",
    "pipeline",
    "cost",
    "preference",
    "rewards",
    "report",
    "data",
    "models",
    "training",
    "recipe",
    "storage",
    "equations",
]
# Folders of tests that are about more than one package: with ORDER, all that there are.
ACROSS = {"benchmarks", "docs", "emoji", "faults", "golden", "hanzi", "house", "parity", "safety", "scenes"}
VAGUE = {"common", "helper", "helpers", "manager", "util", "utils"}
BANNED_WORD = "c" + "fg"
DEVICES = re.compile(r"(cpu|cuda|mps|xpu|hip)(:\d+)?")
RANDOM = {"bernoulli", "manual_seed", "multinomial", "normal", "rand", "randint", "randn", "randperm"}
RANDOM |= {f"{name}_like" for name in ("rand", "randint", "randn")}

_ROOTS = "|".join(["wo" + "rk", "tm" + "p", "ro" + "ot", "ho" + "me", "op" + "t", "Us" + "ers"])
_HOSTS = ["py" + "pi.org", "python" + "hosted.org", "registry.npm" + "js.org", "npm" + "js.com", "anaconda" + ".org"]
MACHINE_PATH = re.compile(rf"(?<![\w.~}})\]-])/(?:{_ROOTS})/\w")
REGISTRY = re.compile("|".join(re.escape(host) for host in _HOSTS))


def imports(source: str, module: str) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything that `module` (dotted, a package ends in `.__init__`) imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)


def wrong_arrows(source: str, module: str) -> list[str]:
    """Imports of `module` (such as mlcm_rl.stages.distill) that point the wrong way."""
    wrong = []
    for line, name in imports(source, module):
        reason = _why_not(module, name)
        if reason:
            wrong.append(f"{module}:{line} imports {name}: {reason}")
    return wrong


def _why_not(module: str, name: str) -> str | None:
    package, *inner = module.split(".")
    top, *path = name.split(".")
    ours = top in ("mlcm_rl", "reward_models")
    if package == "reward_models":
        allowed = name == "mlcm_rl.rewards" or name.startswith("mlcm_rl.rewards.") or top == "reward_models"
        return "a reward file knows the reward contract at most" if ours and not allowed else None
    floor = inner[0]
    if floor not in ORDER:  # __main__, which starts cli, and the package itself
        return (
            "only the command line is started from here"
            if ours and path[:1] not in (["cli"], ["__version__"])
            else None
        )
    if floor == "equations":
        if ours:
            return None if path[:1] == ["equations"] else "equations know nothing of ours"
        return None if top == "torch" or top in sys.stdlib_module_names else "equations know torch and nothing else"
    if floor == "stages" and path[:1] == ["stages"] and path[:2] != inner[:2]:
        return "stages never import each other"
    if top == "mlcm_rl" and path[:1] and path[0] in ORDER and ORDER.index(path[0]) < ORDER.index(floor):
        return f"{path[0]} stands above {floor}"
    if top in HEAVY and floor not in MAY_IMPORT_HEAVY:
        return f"{top} belongs behind {', '.join(sorted(MAY_IMPORT_HEAVY))} and the reward files"
    if floor == "recipe" and top == "torch":
        return "recipes are read without torch"
    return None


def late_package(source: str) -> list[str]:
    """The first of the libraries that mlcm_rl quiets, where a program imports it before mlcm_rl."""
    for line, name in imports("\n".join(_top_level(source)), "program"):
        top = name.partition(".")[0]
        if top == "mlcm_rl":
            break
        if top in ("diffusers", "transformers", "peft"):
            return [f"line {line}: mlcm_rl is imported after {top}, or not at all"]
    return []


def _top_level(source: str) -> list[str]:
    """The lines of `source`, empty but for those of its own imports."""
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
    places = {line for node in nodes for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    return [text if number in places else "" for number, text in enumerate(source.splitlines(), 1)]


def code_in_package(source: str) -> list[str]:
    """What stands in an `__init__.py` beside its docstring, imports and __all__: it hands names on and does nothing."""
    wrong = []
    for node in ast.parse(source).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_names = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("__all__", "__version__")
        if not (is_docstring or is_names or isinstance(node, ast.Import | ast.ImportFrom)):
            wrong.append(f"line {node.lineno}: {ast.unparse(node).splitlines()[0]}")
    return wrong


def unmirrored(tests: list[str]) -> list[str]:
    """What keeps the tests from mirroring the package: `tests` are the files that pytest reads, below tests/."""
    folders = {path.split("/")[0] for path in tests if "/" in path}
    wrong = [f"mlcm_rl/{name} has no folder of tests" for name in ORDER if name not in folders]
    wrong += [f"tests/{name} mirrors no package" for name in sorted(folders - {*ORDER, *ACROSS})]
    wrong += [f"tests/{path} lies in no folder" for path in tests if "/" not in path]
    names = Counter(path.rsplit("/")[-1] for path in tests)
    return wrong + [f"{count} files of tests are named {name}" for name, count in names.items() if count > 1]


UNPICKLERS = {
    "_pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "jsonpickle",
    "joblib",
    "marshal",
    "pickle",
    "shelve",
    "yaml",
}
# Calls that run what they read, by their dotted names.
RUNNERS = {"eval", "exec", "__import__", "code.interact", "os.popen", "os.system", "shutil.unpack_archive"}
RUNNERS |= {"torch.hub.load", "torch.jit.load", "torch.package.PackageImporter", "torch.utils.model_zoo.load_url"}
EXTRACTORS = {"extract", "extractall"}  # of archives: a member may be named ../../anything


def unsafe_loading(source: str) -> list[str]:
    """What would run code that stands in data: pickles, eval, shells, code of a model's folder, archives unpacked."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            wrong += [f"line {node.lineno}: {reason}" for reason in _unsafe_call(node)]
        if isinstance(node, ast.Dict):  # settings handed on as **settings
            pairs = zip(node.keys, node.values, strict=True)
            wrong += [f"line {node.lineno}: {key.value}" for key, value in pairs if _trusting(key, value)]
    unsafe = {name for name in RUNNERS | {"torch.load"} if "." in name}
    for line, name in imports(source, "any"):
        if name.split(".")[0] in UNPICKLERS or name in unsafe:
            wrong.append(f"line {line}: imports {name}")
    return wrong


def _unsafe_call(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    keywords = {word.arg: word.value for word in node.keywords}
    if name == "torch.load" and not _is_true(keywords.get("weights_only")):
        yield "torch.load without weights_only=True"
    if name in RUNNERS:
        yield name
    for keyword in ("allow_pickle", "shell", "trust_remote_code"):
        if keyword in keywords and not _is_false(keywords[keyword]):
            yield f"{keyword}={ast.unparse(keywords[keyword])}"
    if "use_safetensors" in keywords and not _is_true(keywords["use_safetensors"]):
        yield f"use_safetensors={ast.unparse(keywords['use_safetensors'])}"
    filtered = isinstance(keywords.get("filter"), ast.Constant) and keywords["filter"].value == "data"
    if isinstance(node.func, ast.Attribute) and node.func.attr in EXTRACTORS and not filtered:
        yield f"{name} without filter='data'"


def _trusting(key: ast.expr | None, value: ast.expr) -> bool:
    named = isinstance(key, ast.Constant) and key.value in ("allow_pickle", "shell", "trust_remote_code")
    return named and not _is_false(value)


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def _is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def too_long(source: str, file_lines: int = 450, function_lines: int = 120) -> list[str]:
    """A file or a function that no longer fits a reader's head."""
    wrong = []
    num_lines = len(source.splitlines())
    if num_lines > file_lines:
        wrong.append(f"{num_lines} lines in the file, {file_lines} at most")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if length > function_lines:
                wrong.append(f"line {node.lineno}: {node.name} has {length} lines, {function_lines} at most")
    return wrong


def locale_bound(source: str) -> list[str]:
    """Text that is read or written in whatever encoding the machine's locale names."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and _is_text(node) and "encoding" not in {word.arg for word in node.keywords}:
            wrong.append(f"line {node.lineno}: {ast.unparse(node.func)} without encoding=")
    return wrong


def _is_text(node: ast.Call) -> bool:
    """Whether a call reads or writes text, its encoding given by no position."""
    if any(word.arg in ("text", "universal_newlines") and _is_true(word.value) for word in node.keywords):
        return True
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name == "open":
        place = isinstance(node.func, ast.Name)  # of the mode; other libraries' open() takes no such word
        mode = next((word.value for word in node.keywords if word.arg == "mode"), None)
        mode = mode or (node.args[place] if len(node.args) > place else ast.Constant("r"))
        return isinstance(mode, ast.Constant) and set(str(mode.value)) <= set("rwxat+")
    places = {"read_text": 0, "write_text": 1}
    return isinstance(node.func, ast.Attribute) and name in places and len(node.args) <= places[name]


def words(name: str) -> set[str]:
    """The lower-case words of a snake_case, CamelCase or kebab-case name."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)}


TIME_AXIS = {8, 999, 1000}  # segments, the last time, times


def unnamed_times(source: str) -> list[str]:
    """Numbers of the time axis that stand in the code: they have a name, and those of times stand in segments.py.

    A constant in capitals is a name; a shift by 8 bits is no time.
    """
    tree, named = ast.parse(source), set()
    for node in ast.walk(tree):
        is_constant = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).isupper()
        if is_constant or (isinstance(node, ast.BinOp) and isinstance(node.op, ast.LShift | ast.RShift)):
            named |= set(ast.walk(node))
    numbers = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and node not in named)
    return [f"line {n.lineno}: {n.value}" for n in numbers if type(n.value) is int and n.value in TIME_AXIS]


def vague_names(source: str, path: str) -> list[str]:
    """Files, classes and functions of ours that are named for nothing in particular."""
    wrong = [f"{path}: {part!r} says nothing" for part in path.split("/") if words(part) & VAGUE]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and words(node.name) & VAGUE:
            wrong.append(f"{path}:{node.lineno}: {node.name!r} says nothing")
    return wrong


def banned_word(source: str) -> list[str]:
    """Identifiers that hold the word meaning both a recipe and a guidance scale."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        for field in ("id", "attr", "arg", "name", "asname"):
            name = getattr(node, field, None)
            if isinstance(name, str) and BANNED_WORD in words(name):
                wrong.append(f"line {getattr(node, 'lineno', '?')}: {name!r}; say recipe or guidance_scale")
    return wrong


def impure(source: str) -> list[str]:
    """What an equation may not do: own weights, read or write, name a device, draw from the global generator."""
    wrong = []
    for node in ast.walk(ast.parse(source)):
        line = f"line {getattr(node, 'lineno', '?')}"
        if isinstance(node, ast.Attribute | ast.Name) and ast.unparse(node).endswith(("nn.Module", "nn.Parameter")):
            wrong.append(f"{line}: {ast.unparse(node)}")
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"print", "open", "input"}:
            wrong.append(f"{line}: {ast.unparse(node.func)}()")
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and DEVICES.fullmatch(node.value):
            wrong.append(f"{line}: names the device {node.value!r}")
        if _draws_unseeded(node):
            wrong.append(f"{line}: {ast.unparse(node.func)} draws from the global generator")
    return wrong


def _draws_unseeded(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call) or ast.unparse(node.func) not in {f"torch.{name}" for name in RANDOM}:
        return False
    return "generator" not in {word.arg for word in node.keywords}


def machine_bound(text: str) -> list[str]:
    """Lines of a text file that name a package registry's host or a folder of one machine."""
    wrong = []
    for number, line in enumerate(text.splitlines(), 1):
        for pattern in (REGISTRY, MACHINE_PATH):
            found = pattern.search(line)
            if found:
                wrong.append(f"line {number}: {line[max(0, found.start() - 20) : found.end() + 20].strip()!r}")
    return wrong


def broken_floors(requirements: list[str], constraints: str) -> list[str]:
    """Requirements that the pins of constraints.txt do not satisfy, or do not pin."""
    pins = {}
    for line in constraints.splitlines():
        if "==" in line and not line.lstrip().startswith("#"):
            name, version = line.split("#")[0].split(";")[0].split("==")
            pins[canonicalize_name(name.strip())] = version.strip()
    wrong = []
    for requirement in map(Requirement, requirements):
        pin = pins.get(canonicalize_name(requirement.name))
        if pin is None:
            wrong.append(f"{requirement} is not pinned")
        elif not requirement.specifier.contains(pin, prereleases=True):
            wrong.append(f"{requirement} is not satisfied by the pin {pin}")
    return wrong
