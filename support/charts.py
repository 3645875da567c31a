"""Charts and tables of a study, their CSV files, a report as a PDF. Only charts and PDFs need matplotlib."""

import io
import math
import re
import textwrap
from collections import namedtuple
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
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
    kind: str = "line"  # or "points", or "cloud", standardised points without numbers
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


def layout(chart: Chart, width: float) -> tuple[int, int, float]:
    """Rows and columns of the panels that have curves, and their height, for a width; both in inches."""
    n = max(1, sum(bool(panel.curves) for panel in chart.panels))  # a chart may have no curves, and is empty
    columns = min(n, chart.columns, int(width // 3.5) if chart.columns <= 3 else n)  # more: clouds
    return (rows := math.ceil(n / columns)), columns, rows * min(3.2, 1.15 * width / columns)


def draw_panels(chart: Chart, width: float, place) -> None:
    """Draw the panels that have curves on a figure of matplotlib's, or a part of one, so many inches wide."""
    panels, (rows, columns, _) = [panel for panel in chart.panels if panel.curves], layout(chart, width)
    for i, ax in enumerate(place.subplots(rows, columns, squeeze=False).flat):
        draw_panel(ax, panels[i], width / columns) if i < len(panels) else ax.set_axis_off()


def draw_chart(chart: Chart, width: int = 1100) -> Image.Image:
    """The chart as a picture, so many pixels wide; UserError without matplotlib."""
    figure = new_figure(width / 100, layout(chart, width / 100)[2], layout="constrained")
    draw_panels(chart, width / 100, figure)
    figure.savefig(buffer := io.BytesIO(), format="png")
    return Image.open(buffer).convert("RGB")


def draw_panel(ax, panel: Panel, width: float = 4.4) -> None:
    """Draw a panel on matplotlib's axes, with their labels so many inches wide."""
    for i, (name, columns) in enumerate(panel.curves.items()):
        style = {"linewidth": 1.3, "linestyle": ("-", "--", ":")[i // 10 % 3]}  # of ten colours
        drawn = [point for point in zip(*columns, strict=True) if point[0] > panel.x_from]
        columns = tuple(zip(*drawn, strict=True)) or columns
        if len(columns) == 4:
            ax.quiver(*columns, angles="xy", width=0.004, color="gray")
        elif panel.kind in ("points", "cloud"):
            ax.plot(*columns, ".", markersize=1.5, label=name)
        else:
            ax.plot(*columns, marker="." if len(columns[0]) <= 25 else "", label=name, **style)
    ax.set(**{f"{axis}scale": "log" for axis in panel.log})
    for axis in (getattr(ax, f"{axis}axis") for axis in panel.log):
        low, high = axis.get_view_interval()
        axis.set_minor_formatter("{x:g}" if high < 4 * low else "")
        if high < 100 * low:  # there are too few powers of ten
            axis.get_major_locator().set_params(subs=(1, 2, 5))
            axis.set_major_formatter("{x:g}")
    ax.set(xlabel=panel.x_label, ylabel=panel.y_label)
    ax.set_title(panel.title + "\n" * bool(panel.bands), fontsize=min(10, 5.2 * width))
    ax.set_ylim(panel.y_range)
    ax.grid(alpha=0.3)
    if panel.kind == "cloud":
        ax.set(aspect="equal", xlim=(-3, 3), ylim=(-3, 3), xticks=[], yticks=[])
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
        ncols = max(1, int(14 * width) // (8 + max(map(len, panel.curves))))  # what fits side by side
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.25), "ncols": ncols, "frameon": False}
        ax.legend(fontsize=7, markerscale=4 if panel.kind == "points" else 1, **below)


def table(rows: Sequence[dict], digits: int) -> list[list[str]]:
    """A table's cells, its header first: every column that some row has; None as an empty cell."""
    header = list(dict.fromkeys(column for row in rows for column in row))
    cells = [["" if row.get(column) is None else row[column] for column in header] for row in rows]
    text = [[str(c) if isinstance(c, (str, int)) else f"{float(c):.{digits}g}" for c in row] for row in cells]
    return [header, *text]


def aligned(rows: Sequence[dict], most: float = math.inf) -> list[str]:
    """A table as lines of text, numbers on the right; in parts, each with its first column, if too wide."""
    columns = []
    for head, *cells in zip(*table(rows, digits=3), strict=True):
        number = all(re.fullmatch(r"-?[0-9.]*(e[+-]?[0-9]+)?|inf|nan", cell) for cell in cells)
        width = max(map(len, (head, *cells)))
        columns.append([f"{cell:{'>' if number else '<'}{width}}" for cell in (head, *cells)])
    parts = [columns[:1]]
    for column in columns[1:]:
        if sum(len(cells[0]) + 2 for cells in (*parts[-1], column)) > most:
            parts.append(columns[:1])
        parts[-1] = [*parts[-1], column]
    return ["  ".join(row).rstrip() for part in parts for row in zip(*part, strict=True)]


def publish(study: str, result: Result, out: str | None) -> tuple[Image.Image | None, UserError | None]:
    """Write a study's files under free names, print its table; -> its figure, why charts are not in it."""
    folder, missing, points = Path(out or result.folder), None, []
    ends = {"curves": "_curves.csv", "figure": ".png", "table": ".csv", "images": ""}
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
    grids = [part for part in result.figure if not isinstance(part, Chart)]
    wide = max(1100, *(grid.width for grid in grids), 0)  # grids and charts are of one width
    try:
        pictures = [draw_chart(part, wide) if isinstance(part, Chart) else part for part in result.figure]
    except UserError as error:
        missing, pictures = error, grids
    if figure := join(pictures) if pictures else None:
        save_picture(figure, files["figure"])
    for name, x in result.images.items() if out else ():
        for i, picture in enumerate(to_pictures(x), start=1):
            save_picture(picture, files["images"] / f"{name}, image {i}.png", show=False)
    print("\n".join([*aligned(result.rows), *result.notes]))
    print("\n".join(f"{kind:7s} {quoted(file)}" for kind, file in files.items() if file.exists()))
    return figure, missing


Part = tuple[float, Callable]  # of a page: its height in inches, and what draws it in a place of matplotlib's
WIDE, TALL = 7.1, 10.4  # inches of a page that parts may fill


def words(lines: Sequence[str], size: float, **font) -> Part:
    """Lines of text, size in points."""
    text = {"size": size, "va": "top", "linespacing": 1.25, **font}
    return len(lines) * size / 55 + 0.1, lambda place: place.text(0, 1, "\n".join(lines), **text)


def shown(part: Image.Image | Chart) -> list[Part]:
    """The rows of a chart, as vectors, or a grid; a grid that is higher than a page is made to fit."""
    if isinstance(part, Chart):
        panels, (_, columns, _) = [panel for panel in part.panels if panel.curves], layout(part, WIDE)
        rows = [part._replace(panels=panels[i : i + columns]) for i in range(0, len(panels), columns)]
        return [(layout(row, WIDE)[2], partial(draw_panels, row, WIDE)) for row in rows]
    wide = min(WIDE, part.width / 110, (TALL - 3) * part.width / part.height)
    axes = {"rect": (0, 0, wide / WIDE, 1), "frame_on": False, "xticks": [], "yticks": [], "anchor": "NW"}
    draw = {"X": part, "interpolation": "none"}
    return [(wide * part.height / part.width + 0.1, lambda place: place.add_axes(**axes).imshow(**draw))]


def section(title: str, question: str, texts: Sequence[str], figure: Sequence, rows: Sequence[dict]) -> list:
    """The parts of a study: heading, question, figure, how to read it, numbers, room for your text."""
    lines, wrap = aligned(rows, 150), textwrap.wrap
    size = min(8.0, WIDE * 72 / (0.61 * max(map(len, lines), default=1)))  # in points: as wide as fits
    parts = [words(wrap(title, 52), 18), words(wrap(question, 72), 13, style="italic")]
    parts += [row for part in figure for row in shown(part)]
    parts += [words([line for text in texts for line in wrap(text, 105)], 9)]
    parts += [words(lines[i : i + 60], size, family="monospace") for i in range(0, len(lines), 60)]
    return [*parts, (0.9, words(["Your text:"], 9, color="gray")[1])]


def pages_of(sections: Sequence[list[Part]]) -> list[list[Part]]:
    """Sections below each other on pages; a heading stays with its figure, your text with the numbers."""
    pages: list = [[]]
    for parts in sections:
        for block in (parts[:3], *([part] for part in parts[3:-2]), parts[3:][-2:]):
            if pages[-1] and sum(tall for tall, _ in (*pages[-1], *block)) > TALL:
                pages.append([])
            pages[-1] += block
    return pages


def draw_page(parts: Sequence[Part]):
    """A page of a report on A4, its parts from top to bottom."""
    heights, page = [tall for tall, _ in parts], new_figure(8.27, 11.69, layout="constrained")
    sizes = {"width_ratios": [0.6, WIDE, 0.57], "height_ratios": [0.5, *heights, 11.19 - sum(heights)]}
    places = page.add_gridspec(len(parts) + 2, 3, **sizes)
    for i, (_, draw) in enumerate(parts, start=1):
        draw(page.add_subfigure(places[i, 1]))
    return page


def training_log(model) -> list[dict]:
    """The rows of the run's log.csv, with its path as "run"; none for published weights."""
    header, *lines = read_csv(model.folder / "log.csv") or [[]]
    return [{"run": model.path, **dict(zip(header, line, strict=False))} for line in lines]


def settings_section(models: Sequence) -> list[Part]:
    """The settings of each run as a table, and its first, middle and last preview as a figure."""
    keys = {k: 0 for m in models for k, v in m.config.items() if isinstance(v, str | int | float | list)}
    rows = [{"setting": k} | {m.path: str(m.config.get(k))[:40] for m in models} for k in keys]
    made = [sorted((model.folder / "samples").glob("epoch_*.png")) for model in models]
    shown = [[files[i] for i in sorted({0, len(files) // 2, len(files) - 1})] for files in made if files]
    opened = [[Image.open(file, formats=["PNG"]).convert("RGB") for file in files] for files in shown]
    previews = [join(grids, across=True) for grids in opened]
    after = [f"from left to right after {', '.join(file.stem for file in files)}" for files in shown]
    return section("1: Algorithm 1", "What was trained, and how did samples change?", after, previews, rows)


def write_report(path: Path, sections: Sequence[list[Part]]) -> Path:
    """Write sections as a PDF, under that name or the next free one."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_pdf import PdfPages

    text = rc_context({"pdf.fonttype": 42, "figure.constrained_layout.w_pad": 0.07})  # TrueType; a gap
    with text, replacing(path := new_path(path, ".pdf")) as file, PdfPages(file) as pdf:
        for page in pages_of(sections):
            pdf.savefig(draw_page(page))
    return path
