"""Charts and tables of a study, their CSV files, a report as a PDF. Only charts and PDFs need matplotlib."""

import io
import math
import textwrap
from collections import namedtuple
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path

from PIL import Image
from torch import Tensor

from .errors import UserError
from .files import new_path, quoted, read_csv, replacing, write_csv
from .images import to_pictures
from .pictures import join, save_picture

Chart = namedtuple("Chart", "panels columns", defaults=[3])  # side by side; those without curves are left out
Curves = dict[str, tuple[Sequence[float], ...]]  # by name: (x, y) of a line, or (x, y, u, v) of arrows


@dataclass
class Panel:  # axes of a chart
    title: str
    x_label: str
    y_label: str
    curves: Curves
    log: str = ""  # which axes are logarithmic: "", "x", "y" or "xy"
    kind: str = "line"  # or "points", "arrows"
    bands: dict[str, tuple[float, float]] = field(default_factory=dict)  # of x, shaded; x then falls
    x_from: float = -math.inf  # points at a smaller x are in the CSV alone
    y_range: tuple[float, float] | None = None


@dataclass
class Result:  # of a study
    figure: list[Image.Image | Chart]  # from top to bottom
    rows: list[dict]  # of the table, by column
    folder: Path = Path("runs/analysis")  # where it is kept unless --out says otherwise
    notes: Sequence[str] = ()  # how to read the table, printed below it
    images: dict[str, Tensor] = field(default_factory=dict)  # by name (B, C, H, W), single files with --out


def curves(rows: Sequence[dict], by: str, x: str, y: str) -> Curves:
    """y over x from a table, a curve for each value in the column `by`; rows without x or y are left out."""
    found: dict[str, list] = {}
    for row in rows:
        with suppress(KeyError, TypeError, ValueError):  # a cell that is missing, or no number
            point = float(row[x]), float(row[y])
            found.setdefault(str(row[by]), []).append(point)
    return {name: tuple(zip(*points, strict=True)) for name, points in found.items()}


def new_figure(width: float, height: float, **options):
    """A figure of matplotlib's, in inches; UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("charts were left out, for they need matplotlib: pip install matplotlib") from None
    return Figure(figsize=(width, height), dpi=100, **options)


def draw_chart(chart: Chart) -> Image.Image:
    """The chart as a picture; UserError without matplotlib."""
    panels = [panel for panel in chart.panels if panel.curves]
    columns = max(1, min(chart.columns, len(panels)))
    rows = max(1, math.ceil(len(panels) / columns))  # a chart may have no curves, and is empty then
    figure = new_figure(4.4 * columns, 3.5 * rows, layout="constrained")
    for i, ax in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        draw_panel(ax, panels[i]) if i < len(panels) else ax.set_axis_off()
    figure.savefig(buffer := io.BytesIO(), format="png")
    return Image.open(buffer).convert("RGB")


def draw_panel(ax, panel: Panel) -> None:
    """Draw a panel on matplotlib's axes."""
    for name, columns in panel.curves.items():
        drawn = [point for point in zip(*columns, strict=True) if point[0] > panel.x_from]
        columns = tuple(zip(*drawn, strict=True)) or columns
        if panel.kind == "arrows":
            ax.quiver(*columns, angles="xy", width=0.004, color="gray")
        elif panel.kind == "points":
            ax.plot(*columns, ".", markersize=1.5, label=name)
        else:
            ax.plot(*columns, marker="." if len(columns[0]) <= 25 else "", linewidth=1.3, label=name)
    ax.set(**{f"{axis}scale": "log" for axis in panel.log})
    ax.set(title=panel.title + "\n" * bool(panel.bands), xlabel=panel.x_label, ylabel=panel.y_label)
    ax.set_ylim(panel.y_range)
    ax.grid(alpha=0.3)
    low, high = sorted(ax.get_xlim())
    for (name, (start, end)), shade in zip(panel.bands.items(), ("0.78", "0.88", "0.97"), strict=False):
        left, right = max(low, start), min(high, end)
        if left < right:
            ax.axvspan(left, right, color=shade, zorder=-1, linewidth=0)
            place = {"transform": ax.get_xaxis_transform(), "ha": "center", "va": "bottom", "fontsize": 7}
            ax.text((left * right) ** 0.5, 1.01, name, **place)
    if panel.bands:
        ax.set_xlim(high, low)
    if len(panel.curves) > 1:
        ncols = max(1, 64 // (8 + max(map(len, panel.curves))))  # as many names as fit side by side
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.17), "ncols": ncols, "frameon": False}
        ax.legend(fontsize=7, markerscale=4 if panel.kind == "points" else 1, **below)


def table(rows: Sequence[dict], digits: int = 4) -> list[list[str]]:
    """A table's cells, its header first: every column that some row has; None as an empty cell."""

    def cell(value: object) -> str:
        value = "" if value is None else value
        return str(value) if isinstance(value, (str, int)) else f"{float(value):.{digits}g}"

    header = list(dict.fromkeys(column for row in rows for column in row))
    return [header, *([cell(row.get(column)) for column in header] for row in rows)]


def aligned(rows: Sequence[dict]) -> list[str]:
    """A table as lines of text."""
    cells = table(rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]


def publish(study: str, result: Result, out: str | None) -> tuple[Image.Image | None, UserError | None]:
    """Write a study's files under free names, print its table; -> its figure, why charts are not in it."""
    folder, missing, points = Path(out or result.folder), None, []
    folder.mkdir(parents=True, exist_ok=True)
    ends = {"curves": "_curves.csv", "figure": ".png", "table": ".csv"}
    stems = chain([study], (f"{study}_{n}" for n in count(2)))
    named = ({kind: folder / f"{stem}{end}" for kind, end in ends.items()} for stem in stems)
    for files in (files for files in named if not any(file.exists() for file in files.values())):
        with suppress(FileExistsError):  # the name is ours once the file is
            files["table"].touch(exist_ok=False)
            break
    for panel in (panel for part in result.figure if isinstance(part, Chart) for panel in part.panels):
        for name, columns in panel.curves.items():
            curve, drawn = {"chart": panel.title, "curve": name}, zip(*columns, strict=True)
            points += [curve | dict(zip("xyuv", map(float, point), strict=False)) for point in drawn]
    for kind, rows in (("table", result.rows), ("curves", points)):
        if rows:
            write_csv(files[kind], table(rows, digits=6))
    try:
        pictures = [draw_chart(part) if isinstance(part, Chart) else part for part in result.figure]
    except UserError as error:
        missing, pictures = error, [part for part in result.figure if not isinstance(part, Chart)]
    if figure := join(pictures) if pictures else None:
        save_picture(figure, files["figure"])
    for name, x in result.images.items() if out else ():
        files["images"] = files["table"].with_suffix("")
        for i, picture in enumerate(to_pictures(x), start=1):
            save_picture(picture, files["images"] / f"{name}, image {i}.png")
    print("\n".join([*aligned(result.rows), *result.notes]))
    print("\n".join(f"{kind:7s} {quoted(file)}" for kind, file in files.items() if file.exists()))
    return figure, missing


def draw_page(title: str, text: str, figure: Image.Image | None, rows: Sequence[dict]):
    """A page of a report on A4: how to read a study, its figure, its table as far as it fits."""
    width, height, margin, lines = 8.27, 11.69, 0.06, textwrap.wrap(text, 105)  # inches; a share of them
    page, wide, top = new_figure(width, height), 1 - 2 * margin, 0.92 - 0.0155 * len(lines)
    page.text(margin, 0.95, title, fontsize=18)
    page.text(margin, 0.935, "\n".join(lines), fontsize=9, va="top", linespacing=1.4)
    if figure is not None:
        tall = min(wide * width / height * figure.height / figure.width, 2 / 3 * top)
        place = page.add_axes((margin, top - tall, wide, tall), frame_on=False, xticks=[], yticks=[])
        place.imshow(figure, interpolation="none")
        top -= tall + 0.015
    lines = aligned(rows)
    high = max(5.0, (top - 0.03) * height * 72 / 1.15 / max(1, len(lines)))  # in points: all lines fit
    size = min(8.0, high, wide * width * 72 / (0.61 * max(1, *map(len, lines))))  # in points: as wide as fits
    step = 1.15 * size / (72 * height)  # from line to line, as a share of the page
    fit = int((top - 0.03) / step)
    if len(lines) > fit:
        more = f"... and {len(lines) - fit + 1} rows more in the CSV (settings: config.json)"
        lines = [*lines[: fit - 1], more]
    for i, line in enumerate(lines):
        page.text(margin, top - i * step, line, fontsize=size, family="monospace", va="top")
    return page


def training_log(model) -> list[dict]:
    """The rows of the run's log.csv, with its path as "run"; none for published weights."""
    header, *lines = read_csv(model.folder / "log.csv") or [[]]
    return [{"run": model.path, **dict(zip(header, line, strict=False))} for line in lines]


def settings_page(models: Sequence) -> tuple:
    """The settings of each run as a table, and its first, middle and last preview as a figure."""
    keys = dict.fromkeys(k for m in models for k, v in m.config.items() if type(v) in (str, int, float, list))
    rows = [{"setting": k} | {m.path: str(m.config.get(k))[:40] for m in models} for k in keys]
    made = [sorted((model.folder / "samples").glob("epoch_*.png")) for model in models]
    shown = [[files[i] for i in sorted({0, len(files) // 2, len(files) - 1})] for files in made if files]
    opened = [[Image.open(file, formats=["PNG"]).convert("RGB") for file in files] for files in shown]
    previews = [join(grids, across=True) for grids in opened]
    return "settings", "Settings, and previews over the epochs.", join(previews) if previews else None, rows


def write_report(path: Path, pages: Sequence) -> Path:
    """Write pages as a PDF, under that name or the next free one."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_pdf import PdfPages

    text = rc_context({"pdf.fonttype": 42})  # TrueType, whose letters can be selected and searched
    with text, replacing(path := new_path(path, ".pdf")) as file, PdfPages(file) as pdf:
        for page in pages:
            pdf.savefig(page)
    return path
