"""Stage `evaluate`: students beside their teacher on fixed prompts and noise, every row measured alike.

The guided teacher with the most steps is sampled first: distances are to its samples. Picture j of prompt i starts from
the same noise in every row, so that rows can be compared prompt by prompt.

Nothing in memory grows with the number of pictures but a row's readings: each batch is sampled, measured and written to
`rows/`, deleted when the stage is done; so are encoded prompts and the reference's latents. A resumed stage continues
after its last whole batch; a row that any evaluation of these runs has measured is not sampled again (`row_store`).
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.text import Text
from torch import Tensor

from ..data.prompts import Prompt, first_prompts
from ..equations.consistency import squared_l2
from ..evaluation import instruments, metrics, undistilled
from ..evaluation.row_store import RowStore, open_store, record_path, reference_folder
from ..evaluation.rows import Entry, entries, student_rows, teacher_rows
from ..models import pictures, sampler
from ..models.base import Base
from ..models.conditioning import Conditioning, on_device, rows_of, stacked
from ..models.students import Student, load_student
from ..models.teachers import load, tell_truncated
from ..recipe import Evaluate, Recipe
from ..report import assembly, disagreements, page, tables, tuned_students
from ..report import types as report_types
from ..report.definitions import RIGHT
from ..report.types import SampledRow
from ..storage import finite
from ..storage.files import read_json, remove, write_json
from ..storage.tensors import read_tensors, write_tensors
from ..training import processes, progress, seeding
from ..training.devices import device_of

SHOWN_PER_LANGUAGE = 4  # prompts whose pictures are on the page

Sample = tuple[int, int]  # prompt, picture


@dataclass(frozen=True)
class Scene:
    """What all rows share. P prompts, I pictures of each, N = P I samples, prompt by prompt."""

    base: Base
    prompts: list[Prompt]
    instruments: instruments.Instruments
    images_per_prompt: int
    batch_size: int
    seed: int
    page_prompts: list[int]  # indices of prompts whose first picture is on the page
    keep_pictures: bool
    reference: str  # id of the row that distances are to, the first one
    folder: Path

    def batches(self) -> list[list[Sample]]:
        """Return (prompt, picture) of every sample, in batches."""
        samples = [(i, j) for i in range(len(self.prompts)) for j in range(self.images_per_prompt)]
        return [samples[k : k + self.batch_size] for k in range(0, len(samples), self.batch_size)]

    def index(self, sample: Sample) -> int:
        """Return the index of `sample` among all N."""
        return sample[0] * self.images_per_prompt + sample[1]


def run(stage: Evaluate, recipe: Recipe, parents: dict[str, Path], folder: Path) -> None:
    """Measure every row; write report.json, report.md, report.html and their pictures into `folder`.

    `parents` maps a kind of stage to its latest finished folder. Without "distill" students come from `also` alone, and
    without either the table is the teacher's. Raises ValueError for prompts that the file or the judge does not have.
    """
    base = load(recipe.teacher, device_of(recipe.device))
    students = entries(stage, parents, base)
    curves = assembly.read_curves(parents.get("distill"))
    scene = prepare(stage, recipe, base, folder)
    teachers = teacher_rows(stage, recipe.teacher)
    store = open_store(stage, recipe, parents, teachers[0], base.device.type)
    processes.on_rank_zero(store.sweep)
    plan: list[tuple[Entry | None, list[SampledRow]]] = [(None, teachers)]
    plan += [(student, student_rows(stage, index, student)) for index, student in enumerate(students)]
    total = len(scene.batches()) * sum(row.num_evaluations for _, rows in plan for row in rows)
    records = []
    with progress.progress(total, "evaluate") as bar:
        for entry, rows in plan:
            student = None  # one at a time: its weights are freed before the next student's are loaded
            for row in rows:
                place = entry.folder if entry is not None else None
                if not processes.on_rank_zero(is_measured, stage, scene, store, row, place):
                    if entry is not None and student is None:
                        student = load_student(base, entry.folder, base.dtype)
                    draw_batches(scene, row, student, bar)
                    processes.on_rank_zero(finish_row, scene, store, row, place)
                else:
                    bar.advance(row.num_evaluations * len(scene.batches()), row.id)
                records.append(report_types.Row.model_validate(read_json(record_path(folder, row))))
    prompts = [
        report_types.Prompt(
            prompt=prompt.prompt,
            language=prompt.language,
            concept=prompt.concept,
            style=prompt.style,
            parallel=prompt.parallel,
            shown=i in scene.page_prompts,
        )
        for i, prompt in enumerate(scene.prompts)
    ]
    tuned = tuned_students.read({student.name: student.folder for student in students})
    result = assembly.assemble(recipe, stage, prompts, records, base.device, curves, tuned, scene.instruments.networks)
    processes.on_rank_zero(write_report, result, folder)
    for table in tables.terminal(result):
        progress.console.print(table)
    texts = [result.headline.text, *disagreements.sentences(result)]
    for one in result.tuned:
        texts += [tuned_students.sentence(one), *tuned_students.constraints(one)]
    progress.console.print(Text("\n".join(texts)), soft_wrap=True)


def write_report(result: report_types.Report, folder: Path) -> None:
    """Write the report's files into `folder`."""
    assembly.write(result, folder)
    page.write(result, folder)


def prepare(stage: Evaluate, recipe: Recipe, base: Base, folder: Path) -> Scene:
    """Return the scene of `stage`, with its instruments loaded and its prompts encoded on disk."""
    prompts = first_prompts(stage.prompts, stage.num_prompts)
    tell_truncated(base, [prompt.prompt for prompt in prompts], stage.prompts)
    scene = Scene(
        base=base,
        prompts=prompts,
        instruments=instruments.load(stage, prompts, base.resolution, base.device, recipe.seed),
        images_per_prompt=stage.images_per_prompt,
        batch_size=stage.batch_size,
        seed=recipe.seed,
        page_prompts=page_prompts(prompts),
        keep_pictures=stage.keep_pictures,
        reference=teacher_rows(stage, recipe.teacher)[0].id,
        folder=folder,
    )
    for first in processes.share(range(0, len(prompts), stage.batch_size)):
        batch = prompts[first : first + stage.batch_size]
        paths = [prompt_path(scene, i) for i in range(first, first + len(batch))]
        if not all(path.is_file() for path in paths):
            texts = [prompt.prompt for prompt in batch]
            encoded = base.encode_prompts(texts)
            finite.refuse_encoded(encoded, texts, base.dtype)
            for path, row in zip(paths, rows_of(encoded), strict=True):
                write_tensors(path, row)
    base.encode_ahead([])  # the prompts are on disk: no text encoder is needed any more
    processes.wait()
    return scene


def page_prompts(prompts: list[Prompt]) -> list[int]:
    """Return the indices of the first few prompts of each language."""
    languages = dict.fromkeys(prompt.language for prompt in prompts)
    spoken = {name: [i for i, prompt in enumerate(prompts) if prompt.language == name] for name in languages}
    return [i for indices in spoken.values() for i in indices[:SHOWN_PER_LANGUAGE]]


# ---- a row ----


def draw_batches(scene: Scene, row: SampledRow, student: Student | None, bar: progress.Bar) -> None:
    """Sample this process's batches of `row` that are not on disk yet; it has the same ones in every row."""
    for batch in processes.share(scene.batches()):
        path = batch_path(scene, row, batch)
        if not path.is_file():
            write_tensors(path, draw(scene, row, student, batch), may_lack=True)
        bar.advance(row.num_evaluations, row.id)
    bar.advance(row.num_evaluations * (len(scene.batches()) - len(processes.share(scene.batches()))), row.id)
    processes.wait()


def is_measured(stage: Evaluate, scene: Scene, store: RowStore, row: SampledRow, student: Path | None) -> bool:
    """Return whether the record of `row` is there: from before an interruption, or copied from the store.

    The store has no pictures for `keep_pictures`.
    """
    if record_path(scene.folder, row).is_file():
        return True
    return not stage.keep_pictures and store.bring(row, student, scene.folder)


def finish_row(scene: Scene, store: RowStore, row: SampledRow, student: Path | None) -> None:
    """Write the record of a row whose batches are complete, put it into the store, and remove its batches."""
    readings = readings_of(scene, row)
    if row.id == scene.reference and scene.instruments.distribution is not None:
        write_tensors(features_path(scene), scene.instruments.distribution.of_reference(readings))
    record = record_of(scene, row, readings).as_json()
    store.keep(row, student, record, scene.folder)
    write_json(record_path(scene.folder, row), record)
    remove(batch_folder(scene, row))


def readings_of(scene: Scene, row: SampledRow) -> dict[str, Tensor]:
    """Return the readings (N, ...) of a row's batches."""
    parts = [read_tensors(batch_path(scene, row, batch)) for batch in scene.batches()]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def record_of(scene: Scene, row: SampledRow, readings: dict[str, Tensor]) -> report_types.Row:
    """Return the record of `row`, from its `readings` (N, ...)."""
    firsts = [scene.index(batch[0]) for batch in scene.batches()]  # latency is one value a batch: so is its error
    latency = metrics.median_and_error(readings["latency_ms"][firsts])
    distances = readings["distance"].unflatten(0, (-1, scene.images_per_prompt)).mean(1)
    readings = {name: reading for name, reading in readings.items() if name not in ("latency_ms", "distance")}
    reference = read_tensors(features_path(scene)) if scene.instruments.distribution is not None else {}
    values = {"distance": distances, **scene.instruments.values(readings, reference, scene.images_per_prompt)}
    languages = [prompt.language for prompt in scene.prompts]
    by_picture = {}  # what is shown of single pictures: win rates count them, and the page marks those that are right
    if scene.images_per_prompt > 1:
        if row.role == "student":
            by_picture = {name: reading for name, reading in readings.items() if name.startswith("reward/")}
        if "right" in readings:
            by_picture[RIGHT] = readings["right"][:, 0]
    samples = {name: reading.unflatten(0, (-1, scene.images_per_prompt)) for name, reading in by_picture.items()}
    return assembly.record(row.model_dump(), values, languages, *latency, samples)


@torch.no_grad()
def draw(scene: Scene, row: SampledRow, student: Student | None, batch: list[Sample]) -> dict[str, Tensor]:
    """Return the readings of `row` for the B samples of `batch`, "distance" and "latency_ms" (B,) among them.

    Latency is of sampling and decoding, per picture, the text already encoded. Pictures and the reference's latents are
    written to the stage's folder.
    """
    base = scene.base
    numbers = [i for i, _ in batch]
    encoded = [read_tensors(prompt_path(scene, i)) for i in numbers]
    conditioning = on_device(stacked(encoded), base.device)
    started = time.perf_counter()
    latents = sample(scene, row, student, batch, conditioning)
    images = base.autoencoder.decode(latents)
    if base.device.type != "cpu":
        torch.accelerator.synchronize()
    latency = 1e3 * (time.perf_counter() - started) / len(batch)
    refuse_nonfinite(scene, row, student, batch, torch.cat([latents.flatten(1), images.flatten(1)], dim=1))
    save_pictures(scene, row, batch, images)
    latents = latents.cpu()
    places = [reference_path(scene, one) for one in batch]
    if row.id == scene.reference:
        for path, latent in zip(places, latents, strict=True):
            write_tensors(path, {"latent": latent})
    reference = torch.stack([read_tensors(path)["latent"] for path in places])
    return {
        "distance": squared_l2(latents, reference),
        "latency_ms": torch.full((len(batch),), latency),
        **scene.instruments.read(images, [scene.prompts[i] for i in numbers], batch),
    }


def refuse_nonfinite(
    scene: Scene, row: SampledRow, student: Student | None, batch: list[Sample], values: Tensor
) -> None:
    """Raise ValueError for the first sample of `batch` (B) whose `values` (B, ...) hold NaN or infinity."""
    if (place := finite.first_bad_row(values)) is None:
        return
    prompt = scene.prompts[batch[place][0]].prompt
    who, remedy = "the teacher", finite.way_out(scene.base.dtype)
    if student is not None:
        who, remedy = f"the student in {student.folder}", "its training has diverged: lower learning_rate"
        if scene.base.dtype == torch.float16:
            remedy += ", or it is too large for float16, in which it is sampled: set teacher.dtype: bfloat16 or float32"
    raise ValueError(f"row {row.id}: {who} draws NaN or infinity for the prompt {prompt!r}; {remedy}")


def sample(
    scene: Scene, row: SampledRow, student: Student | None, batch: list[Sample], conditioning: Conditioning
) -> Tensor:
    """Return latents (B, C, H, W) of `row` for the samples of `batch`; each has its own generator."""
    base = scene.base
    generators = [seeding.generator(scene.seed, "evaluate", i, j) for i, j in batch]
    noise = base.noise(generators, len(batch))
    if student is not None:
        assert row.times is not None
        assert row.gamma is not None
        return sampler.sample(
            base, student.denoiser, conditioning, noise, row.times, row.gamma, generators, row.conditioned
        )
    assert row.solver is not None
    assert row.guidance_scale is not None
    unconditional = base.unconditional(len(batch))
    return undistilled.sample(base, conditioning, unconditional, noise, row.solver, row.num_steps, row.guidance_scale)


def save_pictures(scene: Scene, row: SampledRow, batch: list[Sample], images: Tensor) -> None:
    """Write those of `images` (B, 3, H, W) that the page shows, and with `keep_pictures` all."""
    for (i, j), image in zip(batch, images, strict=True):
        if scene.keep_pictures:
            path = page.sample_path(scene.folder, row.id, scene.index((i, j)))
            pictures.save_png(pictures.to_pil(image), path)
        if j == 0 and i in scene.page_prompts:
            pictures.save_png(pictures.to_pil(image), page.picture_path(scene.folder, row.id, i))


# ---- what is where ----


def batch_folder(scene: Scene, row: SampledRow) -> Path:
    """Return the folder of the readings of a row that is not done yet."""
    return scene.folder / "rows" / row.id


def batch_path(scene: Scene, row: SampledRow, batch: list[Sample]) -> Path:
    """Return the path of the readings of one batch."""
    first, last = scene.index(batch[0]), scene.index(batch[-1])
    return batch_folder(scene, row) / f"{first:07d}-{last:07d}.safetensors"


def prompt_path(scene: Scene, prompt: int) -> Path:
    """Return the path of the conditioning of a prompt."""
    return scene.folder / "rows" / "prompts" / f"{prompt:07d}.safetensors"


def reference_path(scene: Scene, sample: Sample) -> Path:
    """Return the path of the reference's latents of `sample`: a file each, whatever the batches."""
    return reference_folder(scene.folder) / f"{scene.index(sample):07d}.safetensors"


def features_path(scene: Scene) -> Path:
    """Return the path of the reference's features, beside its latents: other rows' distributions are compared."""
    return reference_folder(scene.folder) / "features.safetensors"
