"""Pictures of sounds and videos: frames in a row, spectrograms with low frequencies at the bottom, waveforms as lines."""

import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch.testing import assert_close

from hf_mixup import MixupModel, get_method
from hf_mixup.core.rng import MixKey
from hf_mixup.report import plots
from hf_mixup.report.examples import Recordings, mixtures
from refusals import refuses
from run_script import ROOT


class Shown(Recordings):
    """As the inputs are."""

    def unnormalised(self, inputs):
        return inputs


def columns_of(inputs, mix, form=None):
    model = MixupModel(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(inputs[0].numel(), 4)), mix)
    return mixtures(model, inputs, torch.arange(len(inputs)) % 4, form or Recordings(), MixKey(3, 0, 1), masks=True)[mix]


def drawn_axes(monkeypatch, tmp_path, columns):
    """What `gallery` draws, by the names of its rows, for the first mixture."""
    figures = []

    class Kept(Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            figures.append(self)

    monkeypatch.setattr("matplotlib.figure.Figure", Kept)
    plots.gallery(tmp_path / "out.png", columns, list("abcd"))
    assert np.asarray(Image.open(tmp_path / "out.png").convert("L")).std() > 10
    across = min(len(columns), plots.CELLS[columns[0]["own"].ndim][2])
    axes = figures[0].axes[::across][:5]
    return dict(zip(("own", "partner", "mask", "mixed", "label"), axes, strict=True))


def test_masks_of_every_input_say_what_is_mixed():
    """own * mask + partner * (1 - mask) is the mixture, in the shape that is drawn."""
    for shape in ((6, 3, 8, 8), (6, 4, 3, 8, 8), (6, 12, 7), (6, 30)):
        inputs = torch.rand(shape)
        for mix in ("cutmix", "mixup", "fmix", *(["videomix"] if len(shape) == 5 else [])):
            name = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(inputs[0].numel(), 4))
            made = mixtures(MixupModel(name, get_method(mix)), inputs, torch.arange(6) % 4, Shown(), MixKey(3, 0, 1), masks=True)[mix]
            for column in made:
                share = column["mask"].unsqueeze(-3) if inputs.ndim > 3 else column["mask"]
                assert_close(share * column["own"] + (1 - share) * column["partner"], column["mixed"], atol=1e-5, rtol=1e-5)


def test_spectrograms_are_the_right_way_up(monkeypatch, tmp_path):
    """A tone that rises is drawn from the lower left to the upper right, whichever axis is first."""
    rising = torch.zeros(4, 10, 8)
    rising[:, torch.arange(8), torch.arange(8)] = 1
    for inputs, form in ((rising, Recordings()), (rising.mT.contiguous(), Recordings(frequency_first=True))):
        axes = drawn_axes(monkeypatch, tmp_path, columns_of(inputs, "cutmix", form))
        shown = axes["own"].images[0]
        assert shown.origin == "lower"
        assert torch.equal(torch.from_numpy(np.array(shown.get_array())), rising[0].T)
        assert [text.get_text() for text in axes["own"].get_yticklabels()] == ["low", "frequency", "high"]
        assert axes["own"].get_xlabel() == "time (frames)"
        assert axes["mask"].images[0].get_array().shape == (8, 10)
        assert axes["mixed"].images[0].get_clim() == axes["own"].images[0].get_clim(), "one scale"


def test_frames_of_a_video_stand_in_a_row(monkeypatch, tmp_path):
    video = torch.rand(4, 12, 3, 6, 5)
    axes = drawn_axes(monkeypatch, tmp_path, columns_of(video, "videomix"))
    shown = np.array(axes["own"].images[0].get_array())
    chosen = np.linspace(0, 11, plots.FRAMES).round().astype(int)
    assert shown.shape == (6, plots.FRAMES * 6 - 1, 3)
    for place, frame in enumerate(chosen):
        np.testing.assert_allclose(shown[:, 6 * place : 6 * place + 5], video[0, frame].permute(1, 2, 0).numpy(), atol=1e-6)
    assert axes["mask"].images[0].get_array().shape == shown.shape[:2]
    normalised = Recordings(mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2)).unnormalised(
        (video - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / 0.2
    )
    assert_close(normalised, video)


def test_waveforms_are_lines(monkeypatch, tmp_path):
    sounds = torch.randn(4, 50)
    axes = drawn_axes(monkeypatch, tmp_path, columns_of(sounds, "cutmix"))
    assert_close(torch.tensor(np.array(axes["own"].lines[0].get_ydata())), sounds[0])
    assert axes["own"].get_ylim() == axes["mixed"].get_ylim()
    assert axes["mask"].images[0].get_array().shape == (1, 50)


def test_the_command_draws_them_and_refuses_what_it_cannot_use(tmp_path):
    sys.path.insert(0, str(ROOT / "training_scripts"))
    import visualize_mixup

    for inputs, mix in (("videos", "videomix"), ("spectrograms", "cutmix"), ("waveforms", "mixup")):
        visualize_mixup.main(["--inputs", inputs, "--mix", mix, "--count", "1", "--output", str(tmp_path / f"{inputs}.png")])
        assert Image.open(tmp_path / f"{inputs}.png").size[0] > 100
    with refuses("--inputs videos draws data that is made here, got --all too; leave one of them out"):
        visualize_mixup.main(["--inputs", "videos", "--all", "--output", str(tmp_path / "no.png")])
    with pytest.raises(ValueError, match="must have known feature maps"):
        visualize_mixup.main(["--inputs", "videos", "--mix", "automix", "--output", str(tmp_path / "no.png")])
