"""Errors of one line with exit status 2, notes, and signals that stop a run between two steps."""

import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import torch

NO_MEMORY = re.compile(  # in the words of CUDA, HIP, MPS, Intel's and Microsoft's libraries, PyTorch, systems
    r"out_?of_?(device_|host_)?(memory|resources)|alloc(ation)?_?failed|memory_?allocation|bad_(alloc|array)"
    r"|invalid_buffer_size|not_enough_(gpu_video_)?memory|insufficient_resources|paging_file_is_too_small"
    r"|(can't|cannot|could_not|unable_to|failed_to)_allocate"
    r"|could_not_(create_a_memory|execute_a_primitive|create_a_primitive$)"
)


class UserError(Exception):
    """Something the user can put right; its text is one clear line that says how."""


class LostProcess(UserError):
    """Another process of the run has ended."""


class Stopped(KeyboardInterrupt):
    """Training was stopped by a signal, and saved."""


def note(message: str) -> None:
    """Tell the user of something that does not stop the work."""
    print(f"note: {message}", file=sys.stderr)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says so: one of Python, of PyTorch, of the libraries it calls, or of the system."""
    said = error.strerror if isinstance(error, OSError) else str(error) * isinstance(error, RuntimeError)
    named = isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))
    return named or bool(NO_MEMORY.search((said or "").lower().replace(" ", "_")))


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process of ours could not be reached."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return together and bool(re.search("gloo|nccl|connection (closed|reset)|c10d", str(error).lower()))


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C (or SIGTERM) sets, to stop between two steps; a second one cuts in."""
    stop = threading.Event()

    def handle(signum: int, frame: object) -> None:
        if not stop.is_set():
            stop.set()
            print("\nstopping after this step (once more to stop at once) ...", file=sys.stderr)
        elif signum != signal.SIGTERM or "LOCAL_RANK" not in os.environ:
            raise KeyboardInterrupt  # torchrun's SIGTERM only passes on a Ctrl-C that we have had already

    here = threading.current_thread() is threading.main_thread()  # the only one that may handle signals
    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM) if here}
    try:
        yield stop
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


class Lasting:
    """A stream that prints any character, an escape if need be; closed, full or broken, it prints nothing."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w")
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()


def run_main(main: Callable[[], None]) -> None:
    """Run a script's main(): an error that its user can put right is one line on stderr and exit status 2."""
    name, out, nowhere = Path(sys.argv[0]).name, Lasting(sys.stdout), Lasting(None)
    err = Lasting(sys.stderr) if sys.stderr else out
    silent = int(os.environ.get("LOCAL_RANK", 0)) > 0  # then another process of this machine prints
    shown, status = nowhere if silent else err, 0

    def fail(message: str, file: Lasting = err) -> int:
        print(f"{name}: error: {message}", file=file)
        return 2

    try:
        with redirect_stdout(nowhere if silent else out), redirect_stderr(shown):
            main()
    except LostProcess as error:
        os._exit(fail(str(error)))  # at once: to leave the process group in good order could take for ever
    except UserError as error:
        status = fail(str(error), shown)
    except SystemExit as error:  # of argparse, or of a run that was stopped
        status = error.code
    except (RuntimeError, MemoryError, OSError) as error:
        if is_lost(error):
            os._exit(fail("another process has ended, and so does this one", shown))
        if is_out_of_memory(error):
            resumed = any(word.split("=")[0] == "--resume" for word in sys.argv)
            take = "add" if resumed else "lower --batch-size; a training run also takes"
            status = fail(f"out of memory: {take} --accumulate PARTS and --checkpointing")
        elif isinstance(error, OSError):
            where = f": {error.filename}" if error.filename else ""
            status = fail(f"{error.strerror or error}{where} (is there room, and may you write there?)")
        else:
            raise
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=shown)
        status = 130
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    if status:
        sys.exit(status)  # outside the handlers: a notebook would print the handled exception too
