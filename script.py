"""How every script begins and ends: in its environment, with one line for whatever ends it early.

    import script  # isort: skip                 # before all that may not be installed
    p = script.Parser(__doc__)
    p.add_argument("--limit", type=script.whole(1))           # every number has a range
    script.run(main, flags)                      # 2 where main raises

Outside of the environment a script ends with one line, and exit code 2, as for every error; the
traceback of what nobody foresaw is shown if PARLEY_TRACEBACK is set. Ctrl-C, SIGTERM and a closed
terminal end it with the command that goes on, and exit code 130, 143 or 129. What is printed has no
control characters. Programs that import it, such as tests, are left alone.
"""
import argparse
import contextlib
import importlib.util
import os
import shlex
import signal
import sys
import traceback
from pathlib import Path

from records import CONTROL, rank_and_world, visible

NEEDED = ("torch", "transformers", "diffusers", "huggingface_hub", "safetensors", "numpy", "scipy",
          "PIL", "tqdm")
HERE = Path(__file__).resolve().parent
NO_MEMORY = ("out of memory", "can't allocate memory", "Cannot allocate memory", "bad_alloc")
UP = "\x1b[A"                                    # of bars below each other
# what lowers the memory of each script
SMALLER = {"finetune.py": "a smaller --micro, --chunk or --batch, or --checkpointing"}


# ---------------------------------------------------------------- flags
class Parser(argparse.ArgumentParser):
    """Of a script's flags. A wrong one is a ValueError of one line, as every other fault."""

    def __init__(self, doc):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(description=doc, formatter_class=raw, allow_abbrev=False)

    def parse_args(self, argv=None, namespace=None):
        argv = sys.argv[1:] if argv is None else argv
        if "" in argv:
            place = argv.index("")
            self.error(f"{' '.join(argv[max(0, place - 1):place])} '': a value is missing")
        return super().parse_args(argv, namespace)

    def error(self, message):
        raise ValueError(f"{message} (--help lists the flags)")


def whole(least, most=10 ** 9):
    """The type of a flag that takes a whole number from least to most."""
    return ranged(int, "a whole number", least, most)


def real(least, most=10 ** 9):
    """The type of a flag that takes a finite number from least to most."""
    return ranged(float, "a number", least, most)


def ranged(kind, what, least, most):
    def read(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if least <= value <= most:           # nan is not
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {what} from {least:g} to {most:g}")
    return read


def typed(parser, args):
    """The names of the flags whose values are not the defaults."""
    return {name for name, value in vars(args).items() if value != parser.get_default(name)}


# ---------------------------------------------------------------- a run
def run(main, flags):
    """Exits with what main(flags()) returns; 2, after a line, where it raises."""
    ready_to_stop()
    sys.stdout, sys.stderr = Plain(sys.stdout), Plain(sys.stderr)
    args = None
    try:
        args = flags()
        code = main(args)
    except Exception as e:
        if "PARLEY_TRACEBACK" in os.environ:
            raise
        say(one_line_of(e, args))
        code = 2
    sys.exit(code)


def one_line_of(error, args):
    """What ended a script, and the remedy. ValueError and OSError are written to be read; of all
    others the place is told, and the models that were in use."""
    text = " ".join(str(error).split())
    models = [f"--{kind} {getattr(args, kind)!r}" for kind in ("captioner", "generator")
              if getattr(args, kind, None)]
    if isinstance(error, MemoryError) or any(words in text for words in NO_MEMORY):
        smaller = SMALLER.get(name(), "a smaller --batch")
        return f"out of memory with {' '.join(models)}: {smaller} takes less ({text[:150]})"
    if isinstance(error, ValueError | OSError):
        return text
    road = traceback.extract_tb(error.__traceback__)
    ours = [step for step in road if Path(step.filename).resolve().parent == HERE]
    place = (ours or road)[-1]
    return (f"{type(error).__name__} in {Path(place.filename).name}, {place.name}: {text[:200]}; "
            f"with {' '.join(models) or 'no model'}: are its files whole? PARLEY_TRACEBACK=1 shows "
            "where")


class Plain:
    """A stream that shows control characters as escapes; a bar's carriage return passes. Where
    nobody reads on, as of `| head`, the work goes on."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w", encoding="utf-8")      # None: it was closed
        with contextlib.suppress(OSError, AttributeError):        # words that it can't show
            self.stream.reconfigure(errors="backslashreplace")

    def write(self, text):
        if CONTROL.search(text) and text.strip("\r\n") != UP:
            text = "\r".join(map(visible, text.split("\r")))
        return self.unless_closed(self.stream.write, text)

    def flush(self):
        return self.unless_closed(self.stream.flush)

    def unless_closed(self, f, *text):
        try:
            return f(*text)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


def look_around():
    """Exits where this Python lacks what the scripts need."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        say(f"{missing[0]} is missing in {sys.executable}: in {HERE}, `source .venv/bin/activate`; "
            "`make demo` sets .venv up")
        sys.exit(2)


def stops():
    """The signals that end a run; not those that its caller has it ignore, as nohup does."""
    named = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
    return [x for x in named if x and signal.getsignal(x) is not signal.SIG_IGN]


def ready_to_stop():
    for number in stops():
        signal.signal(number, stop)


def stop(number, frame):
    """Of a signal: ends the process at once, with the command that goes on. (An exception would
    have to get past whoever catches all, as some libraries do while they are imported.)"""
    if rank_and_world()[0] == 0:                 # of torchrun's processes, one speaks
        line = visible(f"{name()}: stopped; this goes on: {again()}")
        with contextlib.suppress(OSError):       # of a terminal that is gone
            os.write(2, os.fsencode(f"\n{line}\n"))            # a bar may stand before it
    with contextlib.suppress(RuntimeError, OSError):            # it was just being written to
        sys.stdout.flush()
    os._exit(128 + number)


def again():
    """The command as it was typed: typed again, it goes on."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        count = os.environ["LOCAL_WORLD_SIZE"]
        return shlex.join(["torchrun", f"--nproc_per_node={count}", *sys.argv])
    return shlex.join(["python", *sys.orig_argv[1:]])


def name():
    return Path(sys.argv[0]).name


def say(line):
    """A line to stderr; of torchrun's processes by the first, unless they have begun to differ."""
    spread = sys.modules.get("torch.distributed")
    apart = hasattr(spread, "is_initialized") and spread.is_initialized()
    if rank_and_world()[0] == 0 or apart:
        print(visible(f"{name()}: {line}"), file=sys.stderr)


OWN = Path(sys.argv[0]).resolve()
if OWN.parent == HERE and OWN.is_file():         # not of `python -c`
    look_around()
    ready_to_stop()                              # also while the others are imported
