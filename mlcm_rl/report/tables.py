"""A report's table of figures, for the page, for Markdown and for a terminal."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..training.console import wrapped
from . import disagreements, tuned_students
from .comparisons import measured
from .definitions import DISTRIBUTION, GENEVAL, LATENCY, RIGHT, TRAINING, is_detail, metric
from .figures import number, plus_minus, summary, values_of
from .types import NumberTable, Report, Row, TrainingCost

MANY_METRICS = 5  # in the terminal table
MAIN_METRICS = ("distance", "kid", "r@5", RIGHT, "fid", "clip", GENEVAL)  # beside the rewards and DISTRIBUTION


def columns(report: Report) -> list[str]:
    """Return the metrics of the table, in order: R@k and what is right by language where there is more than one."""
    metrics = report.rows[0].metrics
    keys = []
    for key in [key for key, one in metrics.items() if one.values and not is_detail(key)]:
        by_language = [other for other in metrics if other.startswith(f"{key}/")]
        keys += by_language or [key]
    return keys


def main_metrics(report: Report) -> list[str]:
    """Return the metrics with a plot; R@5 is over all languages."""
    keys = measured(report.rows, report.rows[0].metrics)
    return [key for key in keys if key in (*MAIN_METRICS, *DISTRIBUTION) or key.startswith("reward/")]


def heading(row: Row) -> str:
    """Return the heading of a row in the table."""
    if row.role == "reference":
        return "Teacher, reference"
    if row.role == "undistilled":
        return "Teacher, undistilled"
    return f"{row.name}: " + ("conditioned on its target" if row.conditioned else f"K = {row.num_segments}")


def label(row: Row) -> str:
    """Return a row's name under its heading."""
    if row.role == "reference":
        return f"{row.num_steps} steps"
    return row.sampler + (", default" if row.default else "")


def groups(report: Report) -> dict[str, list[Row]]:
    """Return the rows under their headings: the references, every student, the undistilled teacher."""
    rows_by_heading: dict[str, list[Row]] = {}
    for row in sorted(report.rows, key=lambda row: ("reference", "student", "undistilled").index(row.role)):
        rows_by_heading.setdefault(heading(row), []).append(row)
    return rows_by_heading


def cells(report: Report, row: Row) -> list[str]:
    """Return the cells of a row of the table, after its label."""
    values = [number(row.metrics[key]) for key in columns(report)]
    cost = [training(row.training)] if has_training(report) else []
    return [str(row.num_evaluations), latency(row), *cost, *values]


def details(report: Report) -> list[NumberTable]:
    """Return the tables of what is right on pictures: of scenes by question and relation, then by language; by task.

    Empty without a judge of scenes and without a detector.
    """
    metrics = report.rows[0].metrics
    tables = []
    if RIGHT in metrics:
        keys = [key for key in metrics if key.startswith("right@") and "/" not in key]
        tables.append(_of_parts(report, "Right pictures, by question and relation", keys))
        for language in [key.partition("/")[2] for key in metrics if key.startswith(f"{RIGHT}/")]:
            title = f"Right pictures, prompts in {language}"
            tables.append(_of_parts(report, title, [f"{key}/{language}" for key in keys]))
    if GENEVAL in metrics:
        tasks = [key for key in metrics if key.startswith(f"{GENEVAL}@")]
        tables.append(_of_parts(report, "Right pictures, by GenEval's task", tasks))
    return tables


def _of_parts(report: Report, title: str, keys: list[str]) -> NumberTable:
    """Return the table of the metrics `keys`, each a part of a whole, without the whole's name in the heads."""
    heads = [metric(key.partition("/")[0]).label.partition(": ")[2] for key in keys]
    lines = {
        name: [[label(row), str(row.num_evaluations), *(number(row.metrics[key]) for key in keys)] for row in rows]
        for name, rows in groups(report).items()
    }
    return NumberTable(title, "Sampler", ["Evals", *heads], 0, list(lines.items()))


def paired(report: Report) -> list[NumberTable]:
    """Return the tables of paired differences: students' rows to the reference's, and rows to the first student's.

    The second is to the default sampler of the student named first, at equal evaluations. A metric whose value is a
    difference to the reference already stands in the second only.
    """
    keys = [*main_metrics(report), *measured(report.rows, ["diversity"])]
    students = [row for row in report.rows if row.role == "student"]
    if not students:
        return []
    reference = next(row for row in report.rows if row.id == report.reference)
    first = {row.num_evaluations: row for row in students if row.default and row.name == students[0].name}
    beside_reference = [key for key in keys if key not in ("distance", *DISTRIBUTION)]
    tables = []
    if beside_reference:
        title = f"Paired differences to the teacher's {reference.num_steps} steps"
        tables.append(_differences(report, title, beside_reference, {row.id: reference for row in students}))
    rivals = {
        row.id: first[row.num_evaluations]
        for row in report.rows
        if row.role != "reference" and row.num_evaluations in first and row.id != first[row.num_evaluations].id
    }
    if rivals:
        title = f"Paired differences to {students[0].name} at its default sampler, at equal evaluations"
        tables.append(_differences(report, title, keys, rivals))
    return tables


def _differences(report: Report, title: str, keys: list[str], others: dict[str, Row]) -> NumberTable:
    """Return the table of rows less the row that `others` names for their ids."""

    def cells(row: Row) -> list[str]:
        other = others[row.id]
        differences = [summary(values_of(row, key).double() - values_of(other, key).double()) for key in keys]
        return [label(row), str(row.num_evaluations), *map(number, differences)]

    groups_of_cells = [
        (name, [cells(row) for row in rows if row.id in others]) for name, rows in groups(report).items()
    ]
    heads = ["Evals", *(metric(key).label for key in keys)]
    return NumberTable(title, "Sampler", heads, 0, [(name, lines) for name, lines in groups_of_cells if lines])


def latency(row: Row) -> str:
    """Return a row's milliseconds a picture, without error where it has one batch or is of an earlier version."""
    error = row.latency_ms_se
    return plus_minus(row.latency_ms, error) if error else f"{row.latency_ms:.3g}"


def heads(report: Report) -> list[str]:
    """Return the heads of the table's columns, after the label."""
    cost = ["Training evals"] if has_training(report) else []
    return ["Evals", "ms", *cost, *(metric(key).label for key in columns(report))]


def has_training(report: Report) -> bool:
    """Return whether a row has a training cost, and the table so a column for it."""
    return any(row.training for row in report.rows)


def training(cost: TrainingCost | None) -> str:
    """Return a training's evaluations in all, and for each sample the teacher's + the student's; a dash for None."""
    if cost is None:
        return "-"
    return f"{compact(cost.total)} ({cost.teacher_per_sample:.3g} + {cost.student_per_sample:.3g})"


def compact(count: float) -> str:
    """Return `count` with three digits and a unit: 1234567 -> "1.23M"."""
    for unit in ("", "k", "M"):
        if count < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}G"


def terminal(report: Report) -> list[Table]:
    """Return the tables for a terminal: means of the main metrics, and of distances of distributions; so each fits.

    The files have everything.
    """
    num_prompts = len(report.prompts)
    of_distribution = measured(report.rows, DISTRIBUTION)
    main = [key for key in main_metrics(report) if key not in of_distribution]
    grids = [_grid(report, f"{report.name}: means over {num_prompts} prompts", main)]
    if of_distribution:
        keys = ["distance", *of_distribution, *measured(report.rows, ["diversity"])]
        grids.append(_grid(report, f"{report.name}: beside the teacher's own pictures of the same prompts", keys))
    return grids


def _grid(report: Report, title: str, keys: list[str]) -> Table:
    """Return a table for a terminal of the means of `keys`."""
    grid = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    grid.add_column("Sampler", min_width=18)
    cost = has_training(report) and len(keys) <= MANY_METRICS  # 80 columns hold no more
    heads = [metric(key).label.partition(" (")[0].replace("_", " ") for key in keys]
    for head in ("Evals", *["Train"] * cost, *heads):
        grid.add_column("\n".join(wrapped(head, 8)), justify="right", no_wrap=True)
    for name, rows in groups(report).items():
        grid.add_row(name, style="bold")
        for row in rows:
            values = [row.metrics[key].mean for key in keys]
            texts = [str(row.num_evaluations)]
            texts += [training(row.training).partition(" ")[0]] * cost
            texts += ["-" if value is None else f"{value:.3g}" for value in values]
            grid.add_row(f"  {label(row)}", *texts, style="green" if row.default else "")
        grid.add_section()
    return grid


def markdown(report: Report) -> str:
    """Return report.md: the headline, the table, its definitions, and the tuned students."""
    head = ["Sampler", *heads(report)]
    lines = [f"# {report.name}", "", report.headline.text, ""]
    lines += [f"| {' | '.join(head)} |", f"|---{'|--:' * (len(head) - 1)}|"]
    for name, rows in groups(report).items():
        lines.append(f"| **{name}** {'| ' * (len(head) - 1)}|")
        lines += [f"| {' | '.join([label(row), *cells(report, row)])} |" for row in rows]
    lines += _sentences(report)
    for one in [*details(report), *paired(report)]:
        lines += [
            "",
            f"**{one.title}**",
            "",
            f"| {one.first} | {' | '.join(one.heads)} |",
            f"|---{'|--:' * len(one.heads)}|",
        ]
        for name, rows_of_cells in one.groups:
            lines.append(f"| **{name}** {'| ' * len(one.heads)}|")
            lines += [f"| {' | '.join(line)} |" for line in rows_of_cells]
    lines += [
        "",
        f"{len(report.prompts)} prompts; \u00b1 is one standard error over prompts.",
        "",
        f"- **ms**: {LATENCY}",
    ]
    lines += [f"- **Training evals**: {TRAINING}"] * has_training(report)
    lines += [f"- **{metric(key).label}**: {metric(key).definition}" for key in defined(report)]
    lines += [f"- Network `{name}`: {text}" for name, text in network_texts(report)]
    lines += tuned_students.markdown(report)
    lines += ["", f"Measured on {report.environment.device}, {report.created}."]
    return "\n".join(lines) + "\n"


def _sentences(report: Report) -> list[str]:
    """Return the lines of report.md on where distance and distribution disagree; none where neither is compared."""
    texts = disagreements.sentences(report)
    return ["", "**Distance and distribution**", "", *(f"- {text}" for text in texts)] if texts else []


def defined(report: Report) -> list[str]:
    """Return the metrics whose definitions a report needs: those of its table, and the parts of what is right."""
    parts = [key for key in report.rows[0].metrics if is_detail(key) and "/" not in key]
    return list(dict.fromkeys([*columns(report), *parts]))


def network_texts(report: Report) -> list[tuple[str, str]]:
    """Return (name, text) of the networks that measured: figures by different files or pictures do not compare."""
    texts = []
    for name, network in report.networks.items():
        parts = [f"{file}, sha256 {checksum}" for file, checksum in network.files.items()]
        if network.num_real_images is not None:
            parts.append(f"{network.num_real_images} real pictures")
        texts.append((name, "; ".join(parts)))
    return texts
