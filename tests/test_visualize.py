"""Pictures hold what they should: colours, borders, titles, curves; and matplotlib stays out until one is drawn."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from dtm_triton import canvas
from dtm_triton.groups import TokenGroups
from dtm_triton.visualize import draw_curves, draw_groups, draw_maps, draw_masks, draw_reconstructions


def groups_of(*rows: list[int]) -> TokenGroups:
    index = torch.tensor(rows).int()
    size = torch.stack([torch.bincount(row) for row in index.long()]).int()
    return TokenGroups(index, size)


@pytest.fixture
def figures(monkeypatch):
    """The figures as they were saved."""
    seen = []
    save = canvas.save
    monkeypatch.setattr(canvas, "save", lambda figure, path: seen.append(figure) or save(figure, path))
    return seen


def two_colours() -> torch.Tensor:
    image = torch.zeros(1, 3, 8, 8)
    image[:, 0, :, :4] = 1.0  # red on the left
    image[:, 2, :, 4:] = 1.0  # blue on the right
    return image


def picture(axis) -> np.ndarray:
    return axis.get_images()[0].get_array()


def lines(axis) -> list[list[list[float]]]:
    return [segment.tolist() for collection in axis.collections for segment in collection.get_segments()]


def test_groups_are_filled_with_their_mean_colour(tmp_path, figures):
    steps = [groups_of([0, 1, 2, 3]), groups_of([0, 1, 0, 1]), groups_of([0, 0, 1, 1]), groups_of([0, 0, 0, 0])]
    path = draw_groups(two_colours(), steps, (2, 2), tmp_path / "new" / "groups.png")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 1000
    image, single, halves, stacked, whole = figures[0].axes
    assert np.array_equal(picture(image), two_colours()[0].permute(1, 2, 0))
    assert np.array_equal(picture(halves), two_colours()[0].permute(1, 2, 0))
    assert np.allclose(picture(whole), [0.5, 0, 0.5])
    assert [text.get_text() for text in figures[0].texts] == ["image", "4 groups", "2 groups", "2 groups", "1 group"]
    assert lines(image) == [] and lines(whole) == []
    assert lines(halves) == [[[4, 0], [4, 4]], [[4, 4], [4, 8]]]
    assert lines(stacked) == [[[0, 4], [4, 4]], [[4, 4], [8, 4]]]
    assert len(lines(single)) == 4


def test_titles_say_where_images_differ_in_groups(tmp_path, figures):
    """Under a threshold sizes are padded."""
    padded = TokenGroups(torch.tensor([[0, 0, 1, 1], [0, 1, 2, 0]]).int(), torch.tensor([[2, 2, 0], [2, 1, 1]]).int())
    draw_groups(torch.rand(2, 3, 4, 4), [padded], (2, 2), tmp_path / "groups.png")
    assert [text.get_text() for text in figures[0].texts] == ["image", "2 to 3 groups"]


def test_each_row_shows_its_own_image_and_groups(tmp_path, figures):
    images = torch.rand(2, 3, 4, 12)
    groups = groups_of([0, 0, 1, 1, 1, 0], [0, 1, 1, 0, 0, 1])
    draw_groups(images, [groups], (2, 3), tmp_path / "groups.png", titles=["after two"])
    assert [text.get_text() for text in figures[0].texts] == ["image", "after two"]
    axes = figures[0].axes
    for row in range(2):
        shown = torch.tensor(np.asarray(picture(axes[2 * row + 1]))).permute(2, 0, 1)
        label = groups.index[row].view(2, 3).repeat_interleave(2, 0).repeat_interleave(4, 1)
        for group in (0, 1):
            assert torch.allclose(shown[:, label == group], images[row][:, label == group].mean(1, keepdim=True))
    # the room for an image has its proportions, 3 : 1
    box, (width, height) = axes[0].get_position(original=True), figures[0].get_size_inches()
    assert abs(box.width * width / (box.height * height) - 3) < 0.01


def test_borders_are_amber_on_grey_images(tmp_path, figures):
    draw_groups(torch.rand(1, 1, 4, 4), [groups_of([0, 1, 0, 1])], (2, 2), tmp_path / "grey.png")
    draw_groups(two_colours(), [groups_of([0, 1, 0, 1])], (2, 2), tmp_path / "colour.png")
    grey, colour = (figure.axes[1].collections[0].get_colors()[0][:3] for figure in figures)
    assert np.allclose(colour, 1) and not np.allclose(grey, 1)


def test_masks_grey_out_what_is_hidden(tmp_path, figures):
    images = torch.cat([two_colours(), two_colours()])
    masks = torch.tensor([[True, False, False, False], [False, True, True, False]])
    draw_masks(images, masks, (2, 2), tmp_path / "masks.png")
    above, below = figures[0].axes[:2], figures[0].axes[2:]
    for column in range(2):
        assert np.array_equal(picture(above[column]), images[column].permute(1, 2, 0))
        shown, original = picture(below[column]), images[column].permute(1, 2, 0).numpy()
        hidden = masks[column].view(2, 2).repeat_interleave(4, 0).repeat_interleave(4, 1).numpy()
        assert np.array_equal(shown[~hidden], original[~hidden])
        assert np.ptp(shown[hidden], axis=-1).max() < 1e-6, "hidden patches have no colour"
    assert [text.get_text() for text in figures[0].texts] == ["1 of 4 masked", "2 of 4 masked"]


def test_thrown_patches_are_black(tmp_path, figures):
    images = torch.rand(1, 3, 8, 8) * 0.5 + 0.25
    masks, thrown = torch.tensor([[True, False, False, False]]), torch.tensor([[False, True, True, False]])
    draw_masks(images, masks, (2, 2), tmp_path / "masks.png", thrown)
    shown, original = picture(figures[0].axes[1]), images[0].permute(1, 2, 0).numpy()
    assert np.ptp(shown[:4, :4], axis=-1).max() < 1e-6 and shown[:4, :4].min() > 0.5, "masked is light grey"
    assert not shown[:4, 4:].any() and not shown[4:, :4].any(), "thrown is black"
    assert np.array_equal(shown[4:, 4:], original[4:, 4:]), "visible is as it was"
    assert [text.get_text() for text in figures[0].texts] == ["1 masked, 2 thrown"]
    # masked, thrown and visible differ: lines run on all four inner edges
    assert len(lines(figures[0].axes[1])) == 4


def test_maps_are_heat_over_a_grey_image(tmp_path, figures):
    from matplotlib import colormaps

    images = torch.cat([two_colours(), two_colours()])
    maps = torch.tensor([[0, 10, 200, 0], [0, 0, 0, 0]], dtype=torch.uint8)
    path = draw_maps(images, maps, (2, 2), tmp_path / "maps.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [text.get_text() for text in figures[0].texts] == ["half in 1 of 4", "all 0"]
    assert len(figures[0].axes) == 4
    for column in range(2):
        assert np.array_equal(picture(figures[0].axes[column]), images[column].permute(1, 2, 0))
        shown = picture(figures[0].axes[2 + column])
        for patch, weight in enumerate((0, 10 / 200, 1, 0) if column == 0 else (0, 0, 0, 0)):
            y, x = 4 * (patch // 2), 4 * (patch % 2)
            wanted = 0.4 / 3 + 0.6 * np.array(colormaps["inferno"](float(weight))[:3])  # both colours' mean is 1 / 3
            assert np.allclose(shown[y : y + 4, x : x + 4], wanted, atol=1e-5), patch


def test_maps_with_what_is_seen_below(tmp_path, figures):
    maps, masks = torch.tensor([[1.0, 1.0, 1.0, 1.0]]), torch.tensor([[True, False, True, False]])
    thrown = torch.tensor([[False, True, False, False]])
    draw_maps(two_colours(), maps, (2, 2), tmp_path / "maps.png", masks, thrown)
    assert [text.get_text() for text in figures[0].texts] == ["half in 2 of 4"]
    _, _, seen = figures[0].axes
    assert np.allclose(picture(seen)[:, :4], 0.25 / 3 + 0.5) and not picture(seen)[:4, 4:].any()
    assert np.array_equal(picture(seen)[4:, 4:], two_colours()[0].permute(1, 2, 0)[4:, 4:])


def test_reconstructions_are_pasted_into_what_is_visible(tmp_path, figures):
    images, predictions = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8) * 3 - 1
    masks = torch.tensor([[True, False, False, False], [False, False, False, True]])
    thrown = torch.tensor([[False, True, False, False], [False, True, False, False]])
    draw_reconstructions(images, predictions, masks, (2, 2), tmp_path / "again.png", thrown)
    assert [text.get_text() for text in figures[0].texts] == ["image", "what it sees", "predicted"]
    for row in range(2):
        image, seen, predicted = (torch.tensor(np.asarray(picture(axis))).permute(2, 0, 1)
                                  for axis in figures[0].axes[3 * row : 3 * row + 3])  # fmt: skip
        assert torch.equal(image, images[row])
        here = masks[row].view(2, 2).repeat_interleave(4, 0).repeat_interleave(4, 1)
        away = thrown[row].view(2, 2).repeat_interleave(4, 0).repeat_interleave(4, 1)
        assert torch.equal(predicted[:, here], predictions[row][:, here].clamp(0, 1))
        assert not predicted[:, away].any() and not seen[:, away].any()
        rest = ~here & ~away
        assert torch.equal(predicted[:, rest], images[row][:, rest])
        assert torch.equal(seen[:, rest], images[row][:, rest])
        assert not torch.equal(seen[:, here], images[row][:, here])


def test_curves(tmp_path, figures):
    rows = [{"step": 0, "loss": 2.0, "lr": 1e-3, "note": "start", "grad_norm": 3.0, "ok": True}]
    rows += [{"step": 10, "loss": math.nan, "lr": 5e-4}, {"step": 20, "loss": 1, "knn": 0.5, "linear_probe": 0.75}]
    path = draw_curves(rows, tmp_path / "curves.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    loss, rate, accuracy = figures[0].axes
    assert [axis.get_title(loc="left") for axis in figures[0].axes] == ["loss", "learning rate", "accuracy"]
    assert [len(axis.lines) for axis in figures[0].axes] == [1, 1, 2]
    assert loss.lines[0].get_xdata() == pytest.approx([0, 10, 20])
    assert rate.lines[0].get_ydata() == pytest.approx([1e-3, 5e-4])
    assert [line.get_label() for line in accuracy.lines] == ["knn", "linear_probe"]
    assert accuracy.yaxis.get_major_formatter()(0.755, 0) == "75.5 %"


def test_curves_without_steps_or_accuracies(tmp_path, figures):
    draw_curves([{"train/loss": 3.0}, {"train/loss": 2.0}], tmp_path / "curves.png")
    (loss,) = figures[0].axes
    assert loss.lines[0].get_xdata() == pytest.approx([0, 1])


def test_bad_input(tmp_path):
    image, path = torch.rand(1, 3, 8, 8), tmp_path / "never.png"
    with pytest.raises(ValueError, match=r"images .* \[3, 8, 8\]"):
        draw_groups(image[0], [], (2, 2), path)
    with pytest.raises(ValueError, match=r"grid .* \[8, 8\] .* \(3, 2\)"):
        draw_groups(image, [], (3, 2), path)
    with pytest.raises(ValueError, match=r"groups_by_step .* \[1, 4\], got \[1, 3\]"):
        draw_groups(image, [groups_of([0, 1, 2])], (2, 2), path)
    with pytest.raises(ValueError, match=r"titles .* 1, got 2"):
        draw_groups(image, [groups_of([0, 1, 2, 3])], (2, 2), path, titles=["a", "b"])
    with pytest.raises(ValueError, match=r"masks must be bool \[1, 4\], got torch.float32"):
        draw_masks(image, torch.zeros(1, 4), (2, 2), path)
    none = torch.zeros(1, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"thrown must be bool \[1, 4\], got torch.bool \[1, 3\]"):
        draw_masks(image, none, (2, 2), path, none[:, :3])
    with pytest.raises(ValueError, match=r"thrown must not be masked too, got 4"):
        draw_masks(image, ~none, (2, 2), path, ~none)
    with pytest.raises(ValueError, match=r"maps must be \[1, 4\], got \[1, 5\]"):
        draw_maps(image, torch.zeros(1, 5), (2, 2), path)
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"maps must be finite and not below 0, got"):
            draw_maps(image, torch.tensor([[0.0, bad, 1, 1]]), (2, 2), path)
    with pytest.raises(ValueError, match=r"masks must be bool"):
        draw_maps(image, torch.zeros(1, 4), (2, 2), path, torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"predictions must be \[1, 3, 8, 8\] as the images, got \[1, 3, 8, 4\]"):
        draw_reconstructions(image, image[..., :4], none, (2, 2), path)
    with pytest.raises(ValueError, match=r"rows .* 1 rows"):
        draw_curves([{"step": 1, "note": "x"}], path)
    assert not path.exists()


def test_matplotlib_comes_late_and_without_pyplot(tmp_path):
    program = f"""
import sys
from dtm_triton.visualize import draw_curves
assert "matplotlib" not in sys.modules
draw_curves([{{"loss": 1.0}}, {{"loss": 0.5}}], {str(tmp_path / "curves.png")!r})
assert "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
