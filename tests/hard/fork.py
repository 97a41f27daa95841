"""One process that has read the libraries and the miniature; every run of a script is a fork of it.

    warm()
    ran = run("rerank.py", ["photo.jpg", "--out", "o"], folder)         # Ran: rc, out, err, ...

A fork starts in milliseconds where a process of its own takes ten seconds. It runs the script as
`__main__`, from its file, so that its exit code and its one line are those of the command line. It
has a bound on memory and on processor time, and nothing that it does to the models outlives it.
"""
import atexit
import contextlib
import importlib
import io
import os
import re
import resource
import runpy
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
sys.dont_write_bytecode = True
SCRIPTS = {"script", "rerank", "finetune", "evaluate"}             # each fork imports these itself
MEMORY = 2 ** 31                                 # bytes that a run may ask for beyond what is here
SECONDS = 12                                     # of the processor
BAR = re.compile(r"[^|\r\n]*?\d+%\|[^|]*\|[^\[]*\[[^\]]*\]")  # tqdm's


@dataclass
class Ran:
    """What came of a run. stopped: "hung", "processor" or "memory", where a bound ended it."""
    rc: int
    out: str
    err: str
    seconds: float
    stopped: str = ""

    @property
    def lines(self):
        """Lines of stderr without the bars."""
        rows = [BAR.sub("", row).strip() for row in re.split(r"[\r\n]+", self.err)]
        return [row for row in rows if row]

    @property
    def worked(self):
        """Whether a bar was begun."""
        return bool(BAR.search(self.err))


def warm():
    """Imports what scripts import, and keeps the miniature's models for the forks to come."""
    sys.path.insert(0, str(ROOT))
    import diffusers
    import torch
    import torch.distributed
    import transformers
    import transformers.generation.logits_process  # noqa: F401
    rooms = sorted({path.stem for path in ROOT.glob("*.py")} - SCRIPTS)
    rooms = {name: importlib.import_module(name) for name in [*rooms, "miniature.world", "miniature.toys"]}
    captioners, generators, devices = (rooms[x] for x in ("captioners", "generators", "devices"))

    torch.set_num_threads(1)
    rooms["miniature.toys"].tune_process("miniature")
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    keep(captioners.Captioner, "load", devices.device_and_dtype)
    keep(generators.Generator, "load", devices.device_and_dtype)
    for name, kind in (("clip", "image"), ("clip", "text"), ("dino", "image"), ("sbert", "text")):
        keep_judge(rooms["judges"], name, kind)


def keep(kind, name, check):
    """kind.load of the miniature gives the one that was loaded here; of others, what it gave."""
    load, kept = getattr(kind, name), getattr(kind, name)("miniature", "cpu")

    def again(cls, name="miniature", device=None, dtype=None):
        usual = str(device) in ("None", "cpu") and str(dtype) in ("None", "float32", "torch.float32")
        if name != "miniature" or not usual:
            return load(name, device, dtype)
        check(device, dtype)
        return kept
    setattr(kind, name, classmethod(again))


def keep_judge(judges, name, kind):
    """The same of a judge."""
    load, kept = judges.encoder, judges.encoder(name, kind, "miniature", "cpu")

    def again(asked, of, place, device):
        known = (asked, of, place) == (name, kind, "miniature")
        return kept if known else load(asked, of, place, device)
    judges.encoder = again


# ---------------------------------------------------------------- a run
def start(script, argv, folder, log, hook=None, ascii=False, memory=MEMORY, seconds=SECONDS):
    """Process id of a run in `folder`; stdout and stderr go to log.out and log.err. hook: called in
    the fork before the script. ascii: its terminal knows nothing else."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70                                    # of this file's own faults
    try:
        atexit._clear()                          # what the parent would do at its own end
        sys.modules["torch"].set_num_threads(1)  # makes the pool of threads that a fork loses
        os.setsid()
        os.chdir(folder)
        bound(memory, seconds)
        streams(log, ascii)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = [str(ROOT / script), *map(str, argv)]
        sys.path[0] = str(ROOT)
        if hook:
            hook()
        code = as_main(ROOT / script)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def bound(memory, seconds):
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + memory,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def streams(log, ascii):
    """stdin is empty, stdout and stderr are files, with the interpreter's own ways to encode."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    kind = "ascii" if ascii else "utf-8"
    for number, name, errors in ((1, "out", "strict"), (2, "err", "backslashreplace")):
        file = os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(file, number)
        stream = io.TextIOWrapper(io.FileIO(number, "w", closefd=False), kind, errors,
                                  line_buffering=True, write_through=True)
        setattr(sys, "std" + name, stream)


def as_main(script):
    """The exit code that the interpreter would give, what it prints and runs at its end included."""
    code = 0
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as e:
        code = e.code
        if not isinstance(code, int | None):
            print(code, file=sys.stderr)
            code = 1
    except BaseException as e:
        code = 130 if isinstance(e, KeyboardInterrupt) else 1
        with contextlib.suppress(OSError):       # of a stderr that is closed
            traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = 120
    return code or 0


def wait(pid, timeout=40):
    """(exit code, negative for a signal; what stopped it)."""
    began = time.monotonic()
    while True:
        done, status, _ = os.wait4(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() - began > timeout:
            os.killpg(pid, signal.SIGKILL)
            os.wait4(pid, 0)
            return -9, "hung"
        time.sleep(.004)
    code = os.waitstatus_to_exitcode(status)
    return code, "processor" if code == -signal.SIGXCPU else ""


def read(log, name):
    return Path(f"{log}.{name}").read_bytes().decode("utf-8", "replace")


def run(script, argv, folder, hook=None, log=None, timeout=40, **bounds):
    """A run to its end: Ran."""
    began = time.monotonic()
    log = log or Path(folder).parent / (Path(folder).name + ".log")
    rc, stopped = wait(start(script, argv, folder, log, hook, **bounds), timeout)
    out, err = read(log, "out"), read(log, "err")
    if re.search(r"MemoryError|bad_alloc|can't allocate memory|Cannot allocate memory", err) and rc != 2:
        stopped = "memory"
    return Ran(rc, out, err, time.monotonic() - began, stopped)
