"""The full-size models that `bench.py real` measures are as large as the hub's."""
import pytest
import torch

import cycle
from lab import bench


def test_full_size_models_have_the_hubs_sizes():
    """Parameters as the hub counts them. It counts BLIP's head apart from the word embeddings it is tied to."""
    tokenizer = cycle.Generator.load("miniature", "cpu").tokenizer
    with torch.device("meta"):
        pipe, *captioners = (bench.whole(name, tokenizer) for name in ("sd14", "vitb", "vitl", "blip2"))
    sizes = [sum(p.numel() for p in m.parameters()) for m in (pipe.unet, pipe.vae, pipe.text_encoder, *captioners)]
    tied = 30524 * 768
    assert sizes[:5] == [859_520_964, 83_653_863, 123_060_480, 247_414_076 - tied, 469_732_924 - tied]
    assert sizes[5] == pytest.approx(3.745e9, rel=1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would measure")
def test_real_without_a_gpu_is_one_line():
    with pytest.raises(ValueError, match="no CUDA device"):
        bench.bench_real(bench.flags(["real"]))
