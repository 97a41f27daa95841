"""The full-size models that `lab.bench real` measures are as large as the hub's."""
import json

import pytest
import torch

from lab import bench


def test_full_size_models_have_the_hubs_sizes(generator):
    """Parameters as the hub counts them; it counts BLIP's head apart from the word embeddings."""
    with torch.device("meta"):
        pipe, *captioners = (bench.whole(name, generator.tokenizer) for name in bench.MODELS)
    models = (pipe.unet, pipe.vae, pipe.text_encoder, *captioners)
    sizes = [sum(p.numel() for p in model.parameters()) for model in models]
    tied = 30524 * 768
    assert sizes[:3] == [859_520_964, 83_653_863, 123_060_480]
    assert sizes[3:5] == [247_414_076 - tied, 469_732_924 - tied]
    assert sizes[5] == pytest.approx(3.745e9, rel=1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would measure")
def test_real_without_a_gpu_is_one_line():
    with pytest.raises(ValueError, match="no CUDA device"):
        bench.main(bench.flags(["real"]))


def test_memory_is_counted_as_the_allocator_does():
    two = bench.peak(lambda: torch.zeros(1000, 1000) + 1)
    assert 8e6 <= two < 8.1e6


def test_rows_are_written_with_their_machine(tmp_path):
    bench.write(tmp_path / "rows.json", {"step": {"tg": {"s": 1 / 3}}}, gpu=False)
    found = json.loads((tmp_path / "rows.json").read_text())
    assert found["step"] == {"tg": {"s": .33333}} and found["about"]["dtype"] == "float32"
