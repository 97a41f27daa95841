"""Models that come in as file.py:function: somebody's code, run because the command line names it.

    model = load("my_model.py:load", device, dtype)
    captions, likelihood = model.speak(images, n=10)

What it raises becomes a ValueError of one line that names it, and what it says or draws is checked:
else a picture of other numbers, or a caption too few, would be scored in silence. `speak`, `draw`
and `likelihood` are those of captioners.py and generators.py; all else of the model is as it is.
Copy this file alone: it needs torch.
"""
import importlib.util
from pathlib import Path

import torch


def load(name, *args):
    """What `file.py:function` returns. Runs that file."""
    file, function = str(name).rsplit(":", 1)
    if not Path(file).is_file():
        raise ValueError(f"{name}: there is no file {file}; expected file.py:function")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    guarded(f"{name}: {file}", spec.loader.exec_module, module)
    if not callable(getattr(module, function, None)):
        raise ValueError(f"{name}: {file} defines no {function}")
    model = guarded(name, getattr(module, function), *args)
    if not (hasattr(model, "speak") or hasattr(model, "draw")):
        raise ValueError(f"{name} gives {short(model)}: expected an object with `speak` or "
                         "`draw`")
    return Foreign(model, name)


def guarded(name, f, *args, **more):
    """f(*args, **more), or ValueError that names it: code of others may raise anything, and leave
    (Ctrl-C does not pass here: script.py ends the process)."""
    try:
        return f(*args, **more)
    except BaseException as e:
        raise ValueError(f"{name} raised {type(e).__name__}: {' '.join(str(e).split())[:200]}; "
                         "PARLEY_TRACEBACK=1 shows where") from e


class Foreign:
    """A model whose captions, likelihoods and pictures are looked at."""

    def __init__(self, model, name):
        self.__dict__.update(model=model, name=name)
        for method in ("speak", "draw", "likelihood"):
            if hasattr(model, method):           # scripts ask what a model can do by hasattr
                self.__dict__[method] = getattr(self, f"_{method}")

    def __getattr__(self, key):
        return getattr(self.model, key)

    def __setattr__(self, key, value):
        setattr(self.model, key, value)

    def _speak(self, images, n=10, *args, **more):
        what = f"{self.name}, speak"
        found = guarded(what, self.model.speak, images, n, *args, **more)
        captions = found[0] if isinstance(found, tuple) and len(found) == 2 else None
        fits = isinstance(captions, list) and len(captions) == len(images)
        if not fits or not all(texts(row, n) for row in captions):
            raise ValueError(f"{what}: expected {n} captions of each of {len(images)} images, and "
                             f"their log-likelihoods, not {short(found)}")
        return captions, numbers(what, found[1], (len(images), n))

    def _likelihood(self, images, captions, *args, **more):
        what = f"{self.name}, likelihood"
        found = guarded(what, self.model.likelihood, images, captions, *args, **more)
        return numbers(what, found, (len(captions),))

    def _draw(self, captions, *args, **more):
        what = f"{self.name}, draw"
        found = guarded(what, self.model.draw, captions, *args, **more)
        shape = tuple(getattr(found, "shape", ()))
        fits = len(shape) == 4 and shape[:2] == (len(captions), 3)
        if not fits or 0 in shape or not found.is_floating_point():
            raise ValueError(f"{what}: expected floats ({len(captions)}, 3, H, W), not "
                             f"{short(found)} {shape}")
        known = found.float().nan_to_num(0.5)
        if not -0.01 <= known.min() <= known.max() <= 1.01:
            raise ValueError(f"{what}: expected values in [0, 1], not {known.min():g} to "
                             f"{known.max():g}")
        return found.float().cpu().clamp(0, 1)   # nan stays: best_of_n.py counts it


def short(x):
    return ascii(x)[:60]


def texts(row, n):
    """Whether a row is n captions."""
    return isinstance(row, list) and len(row) == n and all(isinstance(x, str) for x in row)


def numbers(what, values, shape):
    """Values as finite float64 of a shape."""
    try:
        found = torch.as_tensor(values).double().cpu()
    except (TypeError, ValueError, RuntimeError) as e:
        raise ValueError(f"{what}: expected log-likelihoods, not {short(values)}") from e
    if found.shape != shape or not found.isfinite().all():
        raise ValueError(f"{what}: expected finite log-likelihoods {shape}, not "
                         f"{short(found.flatten().tolist())} {tuple(found.shape)}")
    return found
