"""Models that come in as file.py:function: somebody's code, run because the command line names it.

    model = load("my_model.py:load", device, dtype)
    captions, likelihood = model.speak(images, n=10)

What it raises becomes a ValueError of one line that names it, and what it says or draws is checked:
else a picture of other numbers, or a caption too few, would be scored in silence. `speak`, `draw`
and `likelihood` are those of captioners.py and generators.py; all else of the model is as it is.
Copy this file alone: it needs torch.
"""
import functools
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
    found = [method for method in CHECKED if hasattr(model, method)]
    if not found:
        raise ValueError(f"{name} gives {short(model)}: expected an object with `speak` or `draw`")
    for method in found:
        checked = functools.partial(CHECKED[method], f"{name}, {method}", getattr(model, method))
        guarded(name, setattr, model, method, checked)
    return model


def guarded(name, f, *args, **more):
    """f(*args, **more), or ValueError that names it: code of others may raise anything."""
    try:
        return f(*args, **more)
    except (Exception, SystemExit) as e:
        raise ValueError(f"{name} raised {type(e).__name__}: {' '.join(str(e).split())[:200]}; "
                         "PARLEY_TRACEBACK=1 shows where") from e


def speak(name, f, images, n=10, *args, **more):
    found = guarded(name, f, images, n, *args, **more)
    try:
        captions, log_p = found
        captions = list(captions)
        kinds = [[type(row), *map(type, row)] for row in captions]
    except (TypeError, ValueError):
        kinds = None
    if kinds != [[list] + [str] * n] * len(images):
        raise ValueError(f"{name}: expected {n} captions of each of {len(images)} images, and "
                         f"their log-likelihoods, not {short(found)}")
    return captions, numbers(name, log_p, (len(images), n))


def likelihood(name, f, images, captions, *args, **more):
    return numbers(name, guarded(name, f, images, captions, *args, **more), (len(captions),))


def draw(name, f, captions, *args, **more):
    found = guarded(name, f, captions, *args, **more)
    floats = torch.is_tensor(found) and found.is_floating_point() and found.numel()
    if not floats or found.shape[:-2] != (len(captions), 3):
        raise ValueError(f"{name}: expected floats ({len(captions)}, 3, H, W), not {short(found)}")
    low, high = found.float().nan_to_num(0.5).aminmax()        # nan stays: best_of_n.py counts it
    if low < -0.01 or high > 1.01:
        raise ValueError(f"{name}: expected values in [0, 1], not {low:g} to {high:g}")
    return found.float().cpu().clamp(0, 1)


def numbers(name, values, shape):
    """Values as finite float64 of a shape."""
    try:
        found = torch.as_tensor(values).double().cpu()
        fits = found.shape == shape and found.isfinite().all()
    except (TypeError, ValueError, RuntimeError):
        fits = False
    if not fits:
        raise ValueError(f"{name}: expected finite log-likelihoods {shape}, not {short(values)}")
    return found


def short(x):
    return f"{ascii(x)[:60]} {getattr(x, 'shape', '')}".strip()


CHECKED = {"speak": speak, "likelihood": likelihood, "draw": draw}
