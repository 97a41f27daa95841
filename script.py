"""How every script begins and ends: in its environment, with one line for whatever ends it early.

    import script  # isort: skip                 # before all that may not be installed
    script.run(main, flags)                      # 2 where main raises ValueError or OSError

Outside of the environment a script ends with one line, and exit code 2. Ctrl-C and SIGTERM end it
with the command that goes on, and exit code 130 or 143. Programs that import it, such as tests, are
left alone.
"""
import argparse
import contextlib
import importlib.util
import os
import shlex
import signal
import sys
from pathlib import Path

NEEDED = ("torch", "transformers", "diffusers", "huggingface_hub", "safetensors", "numpy", "scipy",
          "PIL", "tqdm")
HERE = Path(__file__).resolve().parent


class Parser(argparse.ArgumentParser):
    """Of a script's flags. A wrong one is a ValueError of one line, as every other fault."""

    def __init__(self, doc):
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(description=doc, formatter_class=raw)

    def error(self, message):
        raise ValueError(f"{message} (--help lists the flags)")


def run(main, flags):
    """Exits with what main(flags()) returns; 2, after a line, where it raises what cannot be."""
    ready_to_stop()
    sys.stdout.reconfigure(errors="backslashreplace")     # words that this terminal can't show
    try:
        sys.exit(main(flags()))
    except (ValueError, OSError) as e:
        say(" ".join(str(e).split()))
        sys.exit(2)


def look_around():
    """Exits where this Python lacks what the scripts need."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        say(f"{missing[0]} is missing in {sys.executable}: in {HERE}, `source .venv/bin/activate`; "
            "`make demo` sets .venv up")
        sys.exit(2)


def ready_to_stop():
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


def stop(number, frame):
    """Of a signal: ends the process at once, with the command that goes on. (An exception would
    have to get past whoever catches all, as some libraries do while they are imported.)"""
    if os.environ.get("RANK", "0") == "0":       # of torchrun's processes, one speaks
        again = ["python", *sys.orig_argv[1:]]
        if "LOCAL_WORLD_SIZE" in os.environ:
            again = ["torchrun", f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}", *sys.argv]
        line = f"stopped; this goes on: {shlex.join(again)}"
        os.write(2, os.fsencode(f"\n{name()}: {line}\n"))       # a bar may stand before it
    with contextlib.suppress(RuntimeError):      # it was just being written to
        sys.stdout.flush()
    os._exit(128 + number)


def name():
    return Path(sys.argv[0]).name


def say(line):
    print(f"{name()}: {line}", file=sys.stderr)


OWN = Path(sys.argv[0]).resolve()
if OWN.parent == HERE and OWN.is_file():         # not of `python -c`
    look_around()
    ready_to_stop()                              # also while the others are imported
