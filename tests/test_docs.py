"""The documents: lines of code that are quoted are in the code, links lead somewhere, the example runs."""

import ast
import json
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import PROJECT
from PIL import Image
from run_commands import SCRIPTS, documented, with_names

import edit
import utils
from support.pictures import save_picture
from support.settings import Parser, add_settings

DOCUMENTS = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
QUOTE = re.compile(r"```python\n# (\S+\.py): (\S+)\n(.*?)```", re.DOTALL)  # FILE: FUNCTION, or a name in it
QUOTES = [(path.name, *quote) for path in DOCUMENTS for quote in QUOTE.findall(path.read_text("utf-8"))]


def source_of(file: str, name: str) -> list[str]:
    """The lines of the function, class or assignment of that name, as "Class.function", in a file."""
    text = (PROJECT / file).read_text("utf-8")
    nodes = ast.parse(text).body
    for part in name.split("."):
        nodes = [node for node in nodes if part in names_of(node)]
        assert nodes, f"{file} has no {name}"
        found, nodes = nodes, getattr(nodes[0], "body", [])
    return "\n".join(ast.get_source_segment(text, node) for node in found).splitlines()


def names_of(node: ast.AST) -> set[str]:
    targets = [*getattr(node, "targets", []), *([node.target] if hasattr(node, "target") else [])]
    return {getattr(node, "name", None), *(target.id for target in targets if isinstance(target, ast.Name))}


def code(line: str) -> str:
    """A line of code without its indentation and its comment."""
    return re.split(r"\s+# ", line)[0].strip()


@pytest.mark.parametrize(("document", "file", "name", "quoted"), QUOTES)
def test_a_quoted_line_is_in_the_function_that_is_named(document, file, name, quoted):
    there = [code(line) for line in source_of(file, name)]
    for line in map(code, quoted.splitlines()):
        assert line in there, f"{document}: {file}, {name} has no line {line!r}"
        there = there[there.index(line) + 1 :]  # in this order


def test_the_derivation_quotes_every_part_of_it():
    quoted = {(file, name) for document, file, name, _ in QUOTES if document == "theory.md"}
    parts = "Diffusion.noise_images Diffusion.loss ddpm ddim pndm dpm_solver train clip_x_0 autoencoder_loss"
    assert quoted >= {("ddpm.py", part) for part in parts.split()}
    assert quoted >= {("ddpm_conditional.py", part) for part in ("cfg", "classifier_guidance")}
    assert quoted >= {("utils.py", "p2"), ("analysis.py", "langevin"), ("edit.py", "score_distillation")}


def test_a_line_that_is_gone_fails():
    with pytest.raises(AssertionError, match="has no line"):
        test_a_quoted_line_is_in_the_function_that_is_named("x.md", "utils.py", "p2", "return 2 / snr\n")
    with pytest.raises(AssertionError, match="has no nothing"):
        source_of("utils.py", "nothing")


def test_the_example_draws_the_spiral():
    """The points it draws are as near to the spiral as its own noise and width allow, and reach all of it."""
    text = (PROJECT / "docs/theory.md").read_text("utf-8")
    example = re.search(r"```python\n(import torch.*?)```", text, re.DOTALL)[1]
    lines = [line for line in map(code, example.splitlines()) if line and "import" not in line]
    assert len(lines) == 10
    torch.manual_seed(0)
    found = {}
    exec(example, found)
    x, data = found["x"].flatten(1), found["x_0"].flatten(1)
    apart = torch.cdist(x, data)
    noise = torch.cdist(torch.randn_like(x) * data.std(), data).min(1).values  # what is not learned
    assert apart.min(1).values.mean() < 0.25 * noise.mean()
    assert (apart.min(0).values < 0.1).double().mean() > 0.95  # no part of the spiral is left out


def anchors(path: Path) -> set[str]:
    """The anchors that a host of Markdown makes of its headings."""
    heads = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text("utf-8")):
        if re.match(r"https?:|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        there = document.parent / path if path else document
        assert there.exists(), f"{document.name}: {link}"
        assert not anchor or anchor in anchors(there), f"{document.name}: {link} has no such heading"


def imported(path: Path) -> set[str]:
    """The project's modules that a file imports, by their first names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found & {path.stem for path in PROJECT.glob("*.py")}


def test_the_rooms_import_what_the_page_says():
    text = (PROJECT / "docs/how-it-fits.md").read_text("utf-8")
    told = {
        file: set(re.findall(r"`(\w+)`", names))
        for file, names in re.findall(r"^\| `(\w+\.py)` \|([^|]*)\|", text, re.M)
    }
    assert told == {path.name: imported(path) for path in PROJECT.glob("*.py")}
    assert not set().union(*(imported(path) for path in (PROJECT / "support").glob("*.py")))


def test_the_page_names_every_file_of_support():
    text = (
        (PROJECT / "docs/how-it-fits.md")
        .read_text("utf-8")
        .split("    support/\n")[1]
        .split("    docs/\n")[0]
    )
    named = [name for line in text.splitlines() for name in line[:59].replace(",", " ").split()]
    assert sorted(named) == sorted(path.stem for path in (PROJECT / "support").glob("[!_]*.py"))


def test_the_cells_of_the_notebook_run(monkeypatch):
    """Without Jupyter, and shortened; what a cell shows is its last expression, as in a notebook."""
    monkeypatch.setitem(
        utils.SCHEDULES, "strong_start", None
    )  # which the notebook adds: taken back at the end
    cells = json.loads((PROJECT / "tour.ipynb").read_text("utf-8"))["cells"]
    assert len(cells) == 20
    found, shown = {}, []
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        source = (
            "".join(cell["source"])
            .replace("noise_steps=1000", "noise_steps=50")
            .replace('("auto"), 2', '("cpu"), 1e-4')
        )
        body = ast.parse(source).body
        last = body.pop() if isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), cell["id"], "exec"), found)
        shown.append(last and eval(compile(ast.Expression(last.value), cell["id"], "eval"), found))
    assert sum(isinstance(picture, Image.Image) for picture in shown) >= 7
    assert (found["x"] - found["theirs"]).abs().max() < 1e-4  # Algorithm 2 by hand, and by ddpm()
    for cell in cells:  # outputs are kept small
        assert sum(len(json.dumps(output)) for output in cell.get("outputs", ())) < 60_000


@pytest.mark.parametrize("size", [(40, 30), (8, 8)])
def test_a_notebook_shows_what_a_script_saves(tmp_path, monkeypatch, size):
    shown = []
    display = types.SimpleNamespace(display=shown.append)
    for kernel in (False, True):  # IPython in a terminal, and in a notebook
        shell = types.SimpleNamespace(kernel=1) if kernel else types.SimpleNamespace()
        notebook = types.SimpleNamespace(get_ipython=lambda shell=shell: shell, display=display)
        monkeypatch.setitem(sys.modules, "IPython", notebook)
        save_picture(Image.new("RGB", size), tmp_path / "a.png")
        save_picture(Image.new("RGB", size), tmp_path / "b.png", show=False)
        assert len(shown) == kernel


COMMANDS = documented()


def parser_of(script: str):
    if script in ("edit.py", "analysis.py"):
        return SCRIPTS[script].make_parser()
    add_settings(parser := Parser(), SCRIPTS[script].GROUPS)
    return parser


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words)[:80])
def test_a_documented_command_has_the_flags_of_its_script(words):
    """tests/run_commands.py runs them."""
    script, flags = words[0], with_names(words)
    if script in SCRIPTS and "--help" not in flags:
        parser_of(script).parse_args(flags)
    source = (PROJECT / script).read_text("utf-8")
    for flag in (flag for flag in flags if script not in SCRIPTS and re.fullmatch("--[a-z-]+", flag)):
        assert f'"{flag}"' in source, f"{script} has no {flag}"


def test_a_flag_that_is_gone_fails():
    for words in (("ddpm.py", "--sampling", "4"), ("analysis.py", "noise", "RUN", "--scales", "3")):
        with pytest.raises(SystemExit):
            test_a_documented_command_has_the_flags_of_its_script(words)
    assert len(COMMANDS) > 100 and edit.EDITS.keys() <= {w[1] for w in COMMANDS if w[0] == "edit.py"}
