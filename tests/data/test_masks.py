"""What masks show: every way to draw one, which files belong to which picture, where it fits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from helpers_images import encoded, tiff
from PIL import Image, ImageDraw, ImageFilter

from efficientad.data.datasets import DataSet, Sample
from efficientad.data.decoding import ImageError, Shape
from efficientad.data.layouts import open_dataset
from efficientad.data.masks import REMARKS, marked_pixels, read_levels, read_mask

HEIGHT, WIDTH = 60, 80
PICTURE = Shape((HEIGHT, WIDTH), 1)
DEFECT = np.zeros((HEIGHT, WIDTH), dtype=bool)
DEFECT[10:30, 20:50] = True
DEFECT[40:44, 60:64] = True
GREY = (DEFECT * 255).astype(np.uint8)


def indexed(indices: np.ndarray, colours: list[tuple[int, int, int]]) -> Image.Image:
    image = Image.fromarray(indices.astype(np.uint8), "P")
    image.putpalette([value for colour in colours for value in colour])
    return image


def rgba(colour: np.ndarray, opacity: np.ndarray) -> Image.Image:
    colours = np.broadcast_to(colour, (*opacity.shape, 3))
    return Image.fromarray(np.dstack([colours, opacity]).astype(np.uint8))


RED = np.where(DEFECT[..., None], (200, 0, 0), (0, 0, 0))
PLAIN = {
    "0 and 255": encoded(Image.fromarray(GREY)),
    "0 and 1": encoded(Image.fromarray(DEFECT.astype(np.uint8))),
    "1 bit": encoded(Image.fromarray(DEFECT)),
    "16 bit": encoded(Image.fromarray(DEFECT.astype(np.uint16) * 1000)),
    "floating point": tiff(DEFECT.astype(np.float32) * 0.25),
    "red": encoded(Image.fromarray(RED.astype(np.uint8))),
    "CMYK": tiff(np.asarray(Image.fromarray(GREY).convert("CMYK")), photometric="separated"),
    "palette, white first": encoded(indexed(~DEFECT, [(255, 255, 255), (0, 0, 0)])),
    "palette, black at 7": encoded(
        indexed(np.where(DEFECT, 3, 7), [(9, 0, 0)] * 3 + [(0, 90, 0)] + [(0, 0, 0)] * 4)
    ),
    "palette made by Pillow": encoded(Image.fromarray(GREY).convert("RGB").quantize(2)),
    "palette with transparent black": encoded(
        indexed(DEFECT, [(0, 0, 0), (255, 255, 255)]), transparency=bytes([0, 255])
    ),
    "palette, all black, one transparent": encoded(
        indexed(DEFECT, [(0, 0, 0), (0, 0, 0)]), transparency=bytes([0, 255])
    ),
    "black, in alpha only": encoded(rgba(np.zeros(3), GREY)),
    "white on transparent": encoded(rgba(np.full(3, 255), GREY)),
    "black on transparent white": encoded(rgba(np.where(GREY[..., None], 0, 255), GREY)),
    "red on black, opaque": encoded(rgba(RED, np.full_like(GREY, 255))),
    "white on black, all transparent": encoded(rgba(GREY[..., None], np.zeros_like(GREY))),
    "white and grey on half transparent black": encoded(
        rgba(GREY[..., None], np.where(DEFECT, 255, 100))
    ),
    "grey with alpha": encoded(Image.fromarray(np.dstack([GREY * 0, GREY]), "LA")),
    "colour key": encoded(Image.fromarray(GREY), transparency=0),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_what_a_mask_shows(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "mask"
    path.write_bytes(PLAIN[kind])
    mask = read_mask([path], PICTURE)
    np.testing.assert_array_equal(mask.pixels, DEFECT)
    assert mask.remarks == frozenset()


def test_labels_of_several_kinds_all_count(tmp_path: Path) -> None:
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[5:20, 5:20], labels[5:20, 20:30], labels[30:31, 5:60] = 1, 2, 3
    voc = labels.copy()
    voc[4:21, 4] = voc[4:21, 30] = voc[4, 4:31] = voc[20, 4:31] = 255  # a border around the area
    colours = [(0, 0, 0), (128, 0, 0), (0, 64, 0), (192, 192, 128)]
    for image in (
        Image.fromarray(labels),
        Image.fromarray(labels * 80),
        Image.fromarray(voc),
        indexed(labels, colours),
    ):
        image.save(tmp_path / "mask.png")
        mask = read_mask([tmp_path / "mask.png"], PICTURE)
        np.testing.assert_array_equal(mask.pixels, np.asarray(image) != 0)


def soft_masks() -> dict[str, Image.Image]:
    grey = Image.fromarray(GREY)
    large = Image.new("L", (8 * WIDTH, 8 * HEIGHT))
    ImageDraw.Draw(large).polygon([(100, 80), (500, 120), (420, 400), (200, 300)], fill=255)
    return {
        "bilinear": grey.resize((27, 20)).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR),
        "blurred": grey.filter(ImageFilter.GaussianBlur(1.5)),
        "reduced polygon": large.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS),
    }


@pytest.mark.parametrize("kind", ["bilinear", "blurred", "reduced polygon"])
@pytest.mark.parametrize("as_alpha", [False, True])
def test_smoothed_edges_count_from_half_of_the_highest_level(
    tmp_path: Path, kind: str, as_alpha: bool
) -> None:
    levels = np.asarray(soft_masks()[kind])
    image = rgba(np.full(3, 255), levels) if as_alpha else Image.fromarray(levels)
    image.save(tmp_path / "mask.png")
    mask = read_mask([tmp_path / "mask.png"], PICTURE)
    np.testing.assert_array_equal(mask.pixels, 2.0 * levels >= levels.max())
    assert np.count_nonzero(levels) > mask.pixels.sum()  # there were edges to decide on
    assert mask.remarks == frozenset()


@pytest.mark.parametrize("quality", [30, 75, 90, 97, 100])
@pytest.mark.parametrize("kept_as", ["JPEG", "PNG"])
def test_masks_that_were_once_jpeg(tmp_path: Path, quality: int, kept_as: str) -> None:
    Image.fromarray(GREY).save(tmp_path / "mask.jpg", quality=quality)
    path = tmp_path / "000_mask.png"  # whatever it is called
    with Image.open(tmp_path / "mask.jpg") as image:
        image.load()
        image.save(path, "PNG")
    if kept_as == "JPEG":
        path.write_bytes((tmp_path / "mask.jpg").read_bytes())
    mask = read_mask([path], PICTURE)
    wrong = np.count_nonzero(mask.pixels != DEFECT)
    assert wrong == 0 if quality >= 75 else wrong < 0.05 * DEFECT.sum()


def test_a_black_jpeg_marks_nothing(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 3, GREY.shape, dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "mask.jpg", quality=95)
    mask = read_mask([tmp_path / "mask.jpg"], PICTURE)
    assert not mask.pixels.any()
    assert mask.remarks == {"empty"}


def test_a_soft_mask_without_a_core_is_remarked() -> None:
    ramp = np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1))
    marked, grey = marked_pixels(ramp)
    np.testing.assert_array_equal(marked, ramp >= 128)
    assert grey is False  # as much of it is bright
    hill = np.minimum(ramp, 130)
    hill[0, 0] = 255
    marked, grey = marked_pixels(hill)
    assert grey is True
    assert marked.sum() < (hill != 0).sum()


def test_masks_that_mark_nothing_or_nearly_all(tmp_path: Path) -> None:
    for name, levels, remark in (
        ("none", GREY * 0, "empty"),
        ("inverted", 255 - GREY, "most"),
        ("all", GREY * 0 + 255, "most"),
    ):
        Image.fromarray(levels).save(tmp_path / f"{name}.png")
        mask = read_mask([tmp_path / f"{name}.png"], PICTURE)
        np.testing.assert_array_equal(mask.pixels, levels != 0)
        assert mask.remarks == {remark}


def test_unreadable_levels_are_refused(tmp_path: Path) -> None:
    for number, pixels in enumerate(
        (np.full((6, 8), np.nan, np.float32), np.full((6, 8), -1.0, np.float32))
    ):
        path = tmp_path / f"{number}.tif"
        tifffile.imwrite(path, pixels)
        with pytest.raises(ImageError, match="finite and not negative"):
            read_levels(path, Shape((6, 8), 1))
    tifffile.imwrite(tmp_path / "int.tif", np.full((6, 8), -3, np.int32))
    with pytest.raises(ImageError, match=r"int\.tif.* negative, and -3 is"):
        read_levels(tmp_path / "int.tif", Shape((6, 8), 1))
    tifffile.imwrite(tmp_path / "pages.tif", np.stack([GREY, GREY * 0]), photometric="minisblack")
    mask = read_mask([tmp_path / "pages.tif"], PICTURE)
    np.testing.assert_array_equal(mask.pixels, DEFECT)
    assert mask.remarks == {"pages"}


# Stored pixels of a picture with each orientation, which a viewer shows as DEFECT.
STORED = {
    1: DEFECT, 2: DEFECT[:, ::-1], 3: DEFECT[::-1, ::-1], 4: DEFECT[::-1],
    5: DEFECT.T, 6: DEFECT.T[::-1], 7: DEFECT.T[::-1, ::-1], 8: DEFECT.T[:, ::-1],
}  # fmt: skip


def saved(path: Path, mask: np.ndarray, orientation: int = 1) -> Path:
    exif = Image.Exif()
    exif[274] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((mask * 255).astype(np.uint8)).save(path, exif=exif)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_masks_of_turned_pictures(tmp_path: Path, orientation: int, suffix: str) -> None:
    picture = saved(tmp_path / "picture.jpg", STORED[orientation], orientation)

    def read(path: Path):
        data = DataSet(tmp_path, "mvtec", "x", (), (), (Sample(picture, 1, "dent", (path,)),))
        truth = data.read_truth(data.test[0])
        assert data.mask_size(data.test[0]) == truth.mask.shape
        return truth

    own = read(saved(tmp_path / f"own{suffix}", STORED[orientation], orientation))
    np.testing.assert_array_equal(own.mask, DEFECT)
    assert own.remarks == frozenset()
    upright = read(saved(tmp_path / f"upright{suffix}", DEFECT))
    np.testing.assert_array_equal(upright.mask, DEFECT)
    assert upright.remarks == (frozenset() if orientation == 1 else {"upright"})
    if orientation >= 5:  # else it is upright for all that the files say
        turned = read(saved(tmp_path / f"turned{suffix}", STORED[orientation]))
        np.testing.assert_array_equal(turned.mask, DEFECT)
        assert turned.remarks == {"turned"}


def test_masks_of_another_aspect(tmp_path: Path) -> None:
    path = saved(tmp_path / "turned.png", DEFECT.T)
    with pytest.raises(ImageError, match=r"turned\.png: the mask is 60x80 and its picture 80x60"):
        read_mask([path], PICTURE)
    square = np.asarray(Image.fromarray(GREY).resize((64, 64), Image.Resampling.NEAREST)) != 0
    mask = read_mask([saved(tmp_path / "square.png", square)], PICTURE)
    np.testing.assert_array_equal(mask.pixels, square)
    assert mask.remarks == {"aspect"}
    for size in ((HEIGHT // 3, WIDTH // 3), (HEIGHT * 7, WIDTH * 7), (HEIGHT - 1, WIDTH - 1)):
        scaled = np.zeros(size, bool)
        scaled[1:4, 1:4] = True
        assert read_mask([saved(tmp_path / "scaled.png", scaled)], PICTURE).remarks == frozenset()


def test_several_masks_count_together(tmp_path: Path) -> None:
    first, second = DEFECT.copy(), DEFECT.copy()
    first[35:] = second[:35] = False
    paths = [saved(tmp_path / "0.png", first), saved(tmp_path / "1.png", second)]
    np.testing.assert_array_equal(read_mask(paths, PICTURE).pixels, DEFECT)
    paths.append(saved(tmp_path / "2.png", np.zeros((2 * HEIGHT, 2 * WIDTH), bool)))
    with pytest.raises(ValueError, match=r"0\.png, 1\.png, 2\.png differ in size"):
        read_mask(paths, PICTURE)


def masked(root: Path, picture: str, *masks: str, folder: str = "ground_truth") -> DataSet:
    saved(root / "train/good/0.png", DEFECT)
    saved(root / "test/dent" / picture, DEFECT)
    for mask in masks:
        saved(root / folder / mask, DEFECT)
    return open_dataset(root)


@pytest.mark.parametrize(
    ("picture", "mask", "folder"),
    [
        ("000.png", "dent/000_mask.png", "ground_truth"),
        ("000.jpg", "dent/000.png", "ground_truth"),
        ("000.BMP", "dent/000.bmp", "ground_truth"),
        ("Part_A.png", "dent/part_a_MASK.TIF", "ground_truth"),
        ("000.png", "Dent/000_gt.jpg", "Ground-Truth"),
        ("000.jpg", "dent/000.jpg_mask.png", "masks"),
        ("000.jpg", "dent/000.jpg.png", "GT"),
        ("000.png", "dent/000-label.webp", "groundtruth"),
        ("000.png", "dent/000/left.png", "ground_truth"),
        ("cam1/000.png", "dent/cam1/000_mask.png", "ground_truth"),
        ("cam1/000.png", "dent/000_mask.png", "ground_truth"),
        ("a.b.png", "dent/a.b_mask.png", "ground_truth"),
    ],
)
def test_masks_are_found(tmp_path: Path, picture: str, mask: str, folder: str) -> None:
    data = masked(tmp_path / "x", picture, mask, folder=folder)
    assert [
        path.relative_to(tmp_path / "x" / folder).as_posix() for path in data.test[0].masks
    ] == [mask]
    assert data.notes == ()


@pytest.mark.parametrize(
    "mask", ["dent/0000.png", "dent/000_defect.png", "scratch/000_mask.png", "000_mask.png"]
)
def test_masks_of_no_picture_are_listed(tmp_path: Path, mask: str) -> None:
    data = masked(tmp_path / "x", "000.png", mask)
    assert data.test[0].masks == ()
    assert data.notes == (f"1 file in ground_truth belongs to no picture: {mask}.",)


def test_several_mask_files_of_a_picture(tmp_path: Path) -> None:
    several = ("dent/000_mask_1.png", "dent/000_mask_2.png", "dent/000.png", "dent/.000_mask.png")
    data = masked(tmp_path / "x", "000.png", *several)
    assert [path.name for path in data.test[0].masks] == ["000_mask_1.png", "000_mask_2.png"]
    (note,) = data.notes
    assert note.startswith("1 file in ground_truth left out, whose pictures have a mask")
    assert note.endswith("name: dent/000.png.")
    (tmp_path / "x/ground_truth/dent/notes.txt").touch()
    (tmp_path / "x/ground_truth/dent/Thumbs.db").touch()
    for number in range(9):
        saved(tmp_path / f"x/ground_truth/dent/9{number}.png", DEFECT)
    notes = open_dataset(tmp_path / "x").notes
    assert notes[0].startswith("10 files in ground_truth belong to no picture: dent/90.png, ")
    assert notes[0].endswith(" and 2 more.")


def test_pictures_of_one_name_in_subfolders_keep_their_own_masks(tmp_path: Path) -> None:
    root = tmp_path / "x"
    saved(root / "test/dent/cam2/000.png", DEFECT)
    data = masked(root, "cam1/000.png", "dent/cam1/000_mask.png", "dent/000_mask.png")
    assert [len(sample.masks) for sample in data.test] == [1, 0]
    assert data.notes == ("1 file in ground_truth belongs to no picture: dent/000_mask.png.",)


def test_masks_of_good_pictures_do_not_count(tmp_path: Path) -> None:
    root = tmp_path / "x"
    saved(root / "test/good/000.png", DEFECT)
    data = masked(root, "000.png", "dent/000_mask.png", "good/000_mask.png")
    truths = [data.read_truth(sample) for sample in data.test]
    assert [truth.mask.sum() for truth in truths] == [DEFECT.sum(), 0]
    assert [truth.remarks for truth in truths] == [frozenset(), {"good"}]
    assert set(REMARKS) >= {"good"}


def test_a_bad_first_mask_leaves_the_good_pictures_alone(tmp_path: Path) -> None:
    root = tmp_path / "x"
    saved(root / "test/good/000.png", DEFECT)
    data = masked(root, "000.png", "dent/000_mask.png")
    saved(root / "test/dent/001.png", DEFECT)
    saved(root / "ground_truth/dent/001_mask.png", np.kron(DEFECT, np.ones((2, 2), bool)))
    (root / "ground_truth/dent/000_mask.png").write_bytes(b"damaged")
    data = open_dataset(root)
    bad, sound, good = data.test
    with pytest.raises(ImageError, match="000_mask"):
        data.read_truth(bad)
    assert data.mask_size(good) == data.read_truth(sound).mask.shape == (2 * HEIGHT, 2 * WIDTH)


def test_hidden_files_are_no_masks_of_loco(tmp_path: Path) -> None:
    root = tmp_path / "x"
    for part in ("train", "validation"):
        saved(root / part / "good/0.png", DEFECT)
    saved(root / "test/missing/000.png", DEFECT)
    folder = root / "ground_truth/missing/000"
    saved(folder / "000.png", DEFECT)
    for name in ("._000.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (folder / name).write_bytes(b"no picture")
    data = open_dataset(root)
    assert data.layout == "loco"
    assert data.test[0].masks == (folder / "000.png",)
    assert data.notes == ()
