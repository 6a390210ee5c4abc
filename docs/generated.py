"""The parts of the pages that are made from the code: each is between `<!-- generated: NAME -->` and `<!-- end -->`.

    python docs/generated.py

writes them into the pages, and a test says when that is due. A part is a function below, by its name. The site is built
from `whole`, which has the tables of contents too that only the site shows.
"""

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

from mlcm_rl.cli import app as command_line
from mlcm_rl.cli import shipped_recipes
from mlcm_rl.recipe import shipped
from mlcm_rl.recipe.experiment import STAGES
from mlcm_rl.recipe.families import FAMILIES
from mlcm_rl.recipe.schema import json_schema
from mlcm_rl.storage.files import replacing

DOCS = Path(__file__).resolve().parent
STUDY = DOCS.parent / "recipes" / "study"
sys.path.append(str(STUDY))

import rivals  # noqa: E402
import tables  # noqa: E402
import terms  # noqa: E402
import tuning  # noqa: E402
import tuning_summary  # noqa: E402

NAVIGATION = DOCS / "navigation.md"
START, END = "<!-- generated: {} -->\n", "<!-- end -->\n"
PART = re.compile(r"^<!-- generated: (\w+) -->\n.*?^<!-- end -->\n", re.MULTILINE | re.DOTALL)
CONTENTS = re.compile(r"\n```{toctree}.*?```\n", re.DOTALL)
BOUNDS = {"minimum": ">= {}", "exclusiveMinimum": "> {}", "maximum": "<= {}", "exclusiveMaximum": "< {}"}
NO_BOUND = 1_000_000_000  # the types' limit of every number that has no other


def whole(text: str) -> str:
    """Return the text of a page with its generated parts as they are now. Raise KeyError for a mark that names none."""
    return PART.sub(lambda part: f"{START.format(part[1])}\n{PARTS[part[1]]()}\n{END}", text)


def without_contents(text: str) -> str:
    """Return the text of a page as it is in the repository: without the tables of contents of the site."""
    return CONTENTS.sub("", text)


def write() -> None:
    """Write the parts into every page that has some."""
    for page in sorted(DOCS.glob("*.md")):
        before = page.read_text(encoding="utf-8")
        after = without_contents(whole(before))
        if page != NAVIGATION and PART.search(before) and after != before:
            with replacing(page) as temporary:
                temporary.write_text(after, encoding="utf-8")
            print(page.relative_to(DOCS.parent))


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def contents(pages: list[str], caption: str = "") -> str:
    """Return a table of contents that only the site's navigation shows."""
    options = [f":caption: {caption}"] * bool(caption)
    return "\n".join(["\n```{toctree}", *options, ":hidden:", "", *pages, "```", ""])


def slug(title: str) -> str:
    """Return the anchor of a heading, as GitHub and the site make it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")


# ---- the recipe ----


def recipe() -> str:
    """Return every key of a recipe by section: the recipe, the teacher, each kind of stage, what they contain."""
    schema = json_schema()
    definitions = schema["$defs"]
    stages = {one.__name__: f"kind: {kind}" for kind, one in STAGES.items()}
    sections = [_section("The recipe", schema)]
    sections += [_section(f"`{title}`", definitions[name]) for name, title in stages.items()]
    rest = [name for name in definitions if name not in stages]
    sections += [_section(_title(name), definitions[name]) for name in rest]
    return "\n".join(sections)


def _title(name: str) -> str:
    """Return the heading of a type that is part of others: its name in a recipe is that of the keys that have it."""
    return {"Full": "`kind: full`", "Lora": "`kind: lora`"}.get(name, name)


def _section(title: str, definition: Mapping[str, Any]) -> str:
    required = definition.get("required", [])
    rows = []
    for key, value in definition["properties"].items():
        own = f"`{json.dumps(value['default'])}`" if "default" in value else "the first, with its defaults"
        default = "required" if key in required else own
        rows.append([f"`{key}`", _type(value), default, value.get("description", "")])
    about = " ".join(definition.get("description", "").split())
    return f"## {title}\n\n{about}\n\n{table(['key', 'value', 'default', 'meaning'], rows)}"


def _type(value: Mapping[str, Any]) -> str:
    """Return in words what a value of the schema may be."""
    if "$ref" in value:
        name = value["$ref"].rsplit("/", 1)[1]
        one = {stage.__name__: f"kind: {kind}" for kind, stage in STAGES.items()}.get(name, _title(name).strip("`"))
        return f"[{one}](#{slug(one)})"
    if "const" in value or "enum" in value:
        return ", ".join(f"`{json.dumps(one)}`".replace('"', "") for one in value.get("enum", [value.get("const")]))
    for many in ("anyOf", "oneOf"):
        if many in value:
            return " or ".join(dict.fromkeys(map(_type, value[many])))
    if value.get("type") == "array":
        return f"list of {_type(value['items'])}" if "items" in value else _bracketed(value)
    bounds = [text.format(value[key]) for key, text in BOUNDS.items() if key in value and value[key] != NO_BOUND]
    words = {"null": "none", "string": "text", "object": "mapping", "boolean": "true, false"}
    return " ".join([words.get(value.get("type", ""), value.get("type", "any value")), ", ".join(bounds)]).strip()


def _bracketed(value: Mapping[str, Any]) -> str:
    return "[" + ", ".join(map(_type, value["prefixItems"])) + "]"


# ---- commands ----


def commands() -> str:
    """Return every command of `mlcm` with its arguments and options, as its `--help` has them."""
    root = typer.main.get_command(command_line.app)
    return "\n".join(_command(words, command) for words, command in leaves(root))


def leaves(command: Any, words: tuple[str, ...] = ("mlcm",)) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the words and the command of every command that has none below it."""
    below = getattr(command, "commands", None)
    if below is None:
        yield words, command
        return
    for name, one in below.items():
        yield from leaves(one, (*words, name))


def _command(words: tuple[str, ...], command: Any) -> str:
    context = command.make_context(words[-1], [], resilient_parsing=True)
    usage = " ".join([*words, *(piece for piece in command.collect_usage_pieces(context))])
    rows = []
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None and parameter.name != "help":
            rows.append([f"`{record[0]}`", " ".join(record[1].split())])
        elif record is None:
            rows.append([f"`{parameter.make_metavar(context)}`", " ".join((parameter.help or "").split())])
    about = "\n\n".join(" ".join(part.split()) for part in (command.help or "").split("\n\n"))
    return f"## `{' '.join(words)}`\n\n{about}\n\n```text\n{usage}\n```\n\n{table(['argument', 'meaning'], rows)}"


# ---- families, rewards, recipes ----


def families() -> str:
    """Return the table of what each family's pipeline is made of."""
    rows = []
    for name, layout in FAMILIES.items():
        encoders = [*layout.text.values(), *(f"{one} (optional)" for one in layout.optional.values())]
        time = "rectified flow" if layout.is_flow else f"VP, {layout.num_times} times"
        rows.append(
            [
                f"`{name}`",
                f"`{layout.pipeline}`, `{layout.denoiser_class}`",
                ", ".join(encoders),
                time,
                "one" if layout.embeds_guidance else "two",
                "yes" if layout.takes_text_adapter else "no",
                "LoRA and merged" if layout.loads_lora else "merged",
                ", ".join(f"`{extra}`" for extra in layout.extras.values()) or "-",
            ]
        )
    header = ["family", "pipeline, denoiser", "text encoders", "time", "passes a guided step"]
    return table([*header, "`adapt_text`", "exports", "extra"], rows)


def rewards() -> str:
    """Return the table of the shipped reward models, each with a link to its card."""
    from mlcm_rl.rewards import finding

    rows = []
    for card in sorted(shipped.folder("reward_models").glob("*.md")):
        reward = finding.find(card.stem)
        weights = finding.weights_of(reward)
        rows.append(
            [
                f"[`{card.stem}`](../reward_models/{card.name})",
                str(sys.modules[reward.__module__].__doc__).splitlines()[0],
                "yes" if reward.differentiable else "no",
                (", ".join(reward.languages) or "any") if reward.needs_prompt else "not used",
                "to fetch" if weights else "none, or shipped",
                " + ".join(dict.fromkeys(one.licence for one in weights)) or "-",
            ]
        )
    cards = [f"../reward_models/{card.stem}" for card in sorted(shipped.folder("reward_models").glob("*.md"))]
    return table(["reward", "what it is", "gradient", "prompts", "weights", "their licence"], rows) + contents(cards)


def recipes() -> str:
    """Return the table of the shipped recipes, as `mlcm recipes` prints it."""
    rows = []
    for file in shipped.recipes():
        row = shipped_recipes.summary(file)
        link = f"[`{row['name']}`](../recipes/{file.name})"
        rows.append([link, f"`{row['family']}`", ", ".join(row["stages"]), row["needs"], row["what"]])
    folder = shipped.folder("recipes")
    subjects = [f"../recipes/{page.relative_to(folder).with_suffix('')}" for page in sorted(folder.glob("*/*.md"))]
    return table(["recipe", "base", "stages", "needs", "what it is"], rows) + contents(subjects)


# ---- navigation ----


def more_pages() -> str:
    """Return the table of contents of the pages in docs/ that navigation.md has in no other."""
    placed = NAVIGATION.read_text(encoding="utf-8").split()
    rest = [f"docs/{page.stem}" for page in sorted(DOCS.glob("*.md")) if f"docs/{page.stem}" not in placed]
    rest.remove(f"docs/{NAVIGATION.stem}")
    return contents(rest, "More") if rest else ""


# ---- the studies ----


def study_of_terms() -> str:
    """Return the tables of what each term of distillation is worth on emoji."""
    return _study("terms-emoji-400", list(terms.ROWS), terms.COLUMNS["emoji"])


def study_of_terms_on_scenes() -> str:
    """Return the same of scenes."""
    return _study("terms-scenes-400", list(terms.ROWS), terms.COLUMNS["scenes"])


def study_of_rivals() -> str:
    """Return the tables of the rivals on emoji."""
    return _study("rivals-emoji-1000", [*rivals.ROWS, *rivals.TUNED], rivals.COLUMNS["emoji"])


def _study(folder: str, rows: list[str], columns: tuple[str, ...]) -> str:
    """Return the tables of what is measured in `folder`: what is right, the distance, and KID, whole and on patches."""
    lines = tables.lines_of(STUDY / "measured" / folder, columns, rows)
    shown = [one for one in ("right@all", "distance", "teacher_kid", "teacher_patch_kid") if one in columns]
    return "\n".join(f"{tables.title_of(one)}\n\n{tables.markdown(tables.by_steps(lines, one))}\n" for one in shown)


def study_of_regularisers() -> str:
    """Return the table of what holds a tuned student back on emoji."""
    return _tuned("emoji", "regularisers", 100)


def study_of_constraints() -> str:
    """Return the table of two rewards on emoji, by weights and by limits."""
    return _tuned("emoji", "constraints", 100)


def study_without_gradient() -> str:
    """Return the table of tuning to a reward without gradient on scenes."""
    return _tuned("scenes", "without_gradient", 120)


def _tuned(subject: str, group: str, num_steps: int) -> str:
    """Return the table of a group of the study of tuning, of `num_steps` of the subject's demo."""
    folder = STUDY / "measured" / f"{group}-{subject}-{num_steps}"
    return tuning_summary.text(folder, list(tuning.ROWS[subject][group]), tuning.COLUMNS[subject]) + "\n"


PARTS = {
    part.__name__: part
    for part in (
        *(recipe, commands, families, rewards, recipes, more_pages),
        *(study_of_terms, study_of_terms_on_scenes, study_of_rivals),
        *(study_of_regularisers, study_of_constraints, study_without_gradient),
    )
}


if __name__ == "__main__":
    write()
