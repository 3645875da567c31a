"""The rooms of the project: their sizes, and what imports what.

python tests/test_rooms.py prints the counts. As a test it fails when a room is overfull, a function is too
long or takes too many parameters, `support` imports a script, or a training step passes through too many
functions.
"""

import ast
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
BOUNDS = {  # lines, as wc -l counts them
    **{"ddpm.py": 600, "ddpm_conditional.py": 395, "modules.py": 520, "utils.py": 380},
    **{"analysis.py": 1190, "edit.py": 700, "README.md": 200},
}
MENDED = 330  # lines that other people's bug reports took, all of them in support (tests/test_reports.py)
SUPPORT, SUPPORT_FILE, ALL = 2750 + MENDED, 450, 6435 + MENDED  # 335 of them for latent diffusion
LONGEST, MOST_PARAMETERS = 60, 8
MAY_IMPORT = {  # of the project, besides support; nobody imports analysis or edit
    "utils": set(),
    "modules": set(),
    "ddpm": {"utils", "modules"},
    "ddpm_conditional": {"utils", "modules", "ddpm"},
    "analysis": {"utils", "modules", "ddpm", "ddpm_conditional"},
    "edit": {"utils", "modules", "ddpm", "ddpm_conditional"},
}
SOURCES = [*(PROJECT / f"{name}.py" for name in MAY_IMPORT), *sorted((PROJECT / "support").glob("*.py"))]
NOISE = ("alpha_bar", "eps_theta", "schedule", "timestep", "denois")  # what support knows nothing of


def lines(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def functions(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def parameters(function):
    a = function.args
    return [p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if p is not None]


def imported(path):
    """The project's own modules that a file imports; relative imports are of support."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add("support" if node.level else node.module.split(".")[0])
    return found & {*MAY_IMPORT, "support"}


TRACE = """
import sys
sys.path.insert(0, {project!r})
sys.argv = ["ddpm.py"]
import torch, ddpm
from support.trainer import Trainer
ours, seen, codes, depth = {ours!r}, set(), set(), []

def watch(frame, event, arg):
    code = frame.f_code
    if event == "call" and code.co_filename in ours and not code.co_name.startswith("<"):
        seen.add((code.co_filename, code.co_name))
        codes.add(code)
        if code.co_name == "loss" and not depth:
            calls = 0
            while frame.f_code.co_name != "main":
                calls += frame.f_code.co_filename in ours
                frame = frame.f_back
            depth.append(calls)

class Stop(BaseException):
    pass

def stop(*_, **__):
    raise Stop

torch.optim.AdamW.step = stop
sys.setprofile(watch)
try:
    ddpm.main()
except Stop:
    pass
sys.setprofile(None)
print("TRACE", len(seen), depth[0], len(codes))
print(*sorted(name for _, name in seen), file=sys.stderr)
"""


def trace(folder):
    """How many of our functions run up to the first optimizer step, calls from main to the loss, names.

    A name counts once a file, so the `__init__` of all layers in modules.py is one. The third number counts
    each of them.
    """
    code = TRACE.format(project=str(PROJECT), ours=set(map(str, SOURCES)))
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert "TRACE" in run.stdout, run.stderr
    count, depth, each = map(int, run.stdout.split("TRACE")[1].split()[:3])
    return count, depth, each, run.stderr.strip().splitlines()[-1]


def counts():
    """{what: (count, bound)} of every room."""
    found = {name: (lines(PROJECT / name), bound) for name, bound in BOUNDS.items()}
    support = {f"support/{p.name}": lines(p) for p in (PROJECT / "support").glob("*.py")}
    found |= {name: (count, SUPPORT_FILE) for name, count in sorted(support.items())}
    scripts = sum(
        count for name, (count, _) in found.items() if name.count("/") == 0 and name.endswith(".py")
    )
    found["support"] = sum(support.values()), SUPPORT
    found["all"] = scripts + sum(support.values()), ALL
    every = [(f, path) for path in SOURCES for f in functions(path)]
    found["longest function"] = max(f.end_lineno - f.lineno + 1 for f, _ in every), LONGEST
    found["most parameters"] = max(len(parameters(f)) for f, _ in every), MOST_PARAMETERS
    return found


@pytest.mark.parametrize("room", counts())
def test_no_room_is_overfull(room):
    count, bound = counts()[room]
    assert count <= bound


def test_imports_run_one_way():
    for path in SOURCES:
        allowed = MAY_IMPORT.get(path.stem, set()) | {"support"} if path.parent == PROJECT else {"support"}
        assert imported(path) <= allowed, path.name


def test_nobody_takes_args():
    for path in SOURCES:
        for function in functions(path):
            assert "args" not in parameters(function), (path.name, function.name)


def test_support_knows_nothing_of_noise():
    for path in (PROJECT / "support").glob("*.py"):
        if path.name != "published.py":  # which must know the words of published config files
            text = path.read_text(encoding="utf-8").lower()
            assert not [word for word in NOISE if word in text], path.name


def test_the_way_from_main_to_the_loss_is_short(tmp_path):
    count, depth, _, names = trace(tmp_path)
    assert depth <= 5 and count <= 60, names


if __name__ == "__main__":
    for what, (count, bound) in counts().items():
        print(f"{what:28s}{count:6d}  of {bound}{'' if count <= bound else '   TOO MANY'}")
    count, depth, each, names = trace(tempfile.mkdtemp())
    print(f"{'functions to the first step':28s}{count:6d}  of 60 ({each} with every class's own)")
    print(f"{'calls from main to the loss':28s}{depth:6d}  of 5\n{names}")
