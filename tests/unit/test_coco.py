"""Images with boxes: COCO's format is read, the seed and the iteration determine a batch, errors are clear."""

import json
import threading
from pathlib import Path

import pytest
import torch
from common import error_of
from PIL import Image

from dataset import shapes
from dataset.annotations import AnnotatedImages, annotated, checked_annotations, read_coco
from dataset.coco import (
    AHEAD,
    DetectionLoader,
    DetectionTestLoader,
    create_detection_data,
    identify_detection_data,
)

TINY80 = Path(__file__).resolve().parents[3] / "shared" / "data" / "coco_tiny80"
CATEGORIES = [{"id": 9, "name": "cat"}, {"id": 2, "name": "dog"}]
CPU = {"device": "cpu", "num_workers": 0}


def content_of(sizes, boxes=None):
    """Return annotations of images of some (width, height), by default with one box each."""
    images = [
        {"id": 10 + i, "file_name": f"{i}.png", "width": width, "height": height}
        for i, (width, height) in enumerate(sizes)
    ]
    if boxes is None:
        boxes = [{"image_id": each["id"], "category_id": 9, "bbox": [1, 2, 3, 4]} for each in images]
    return {"images": images, "annotations": boxes, "categories": CATEGORIES}


def box_of(box, image=10, category=9, **more):
    return {"image_id": image, "category_id": category, "bbox": box, **more}


def split_of(sizes, boxes=None):
    """Return images in memory; the largest size is that of the pixels."""
    split, _ = annotated(checked_annotations(content_of(sizes, boxes), "here"))
    height, width = split.sizes.amax(0).tolist()
    pixels = torch.randint(256, (len(sizes), 3, height, width), dtype=torch.uint8, generator=torch.Generator())
    return split._replace(pixels=pixels)


def loader_of(split, batch_size=4, seed=1, iterations=40, period=10, **options):
    return DetectionLoader(split, batch_size, seed, iterations, period, **{**CPU, **options})


def write(folder, sizes=((8, 6), (6, 8)), boxes=None, content=None, mode="RGB"):
    """Write both splits of a data set; return its folder as text."""
    content = content_of(sizes, boxes) if content is None else content
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        (folder / "annotations" / f"instances_{split}.json").write_text(text)
        (folder / split).mkdir()
        for i, size in enumerate(sizes):
            Image.new(mode, size, 200 if mode == "L" else (10, 60, 200, 0)[: len(mode)]).save(
                folder / split / f"{i}.png", "TIFF" if mode == "CMYK" else "PNG"
            )
    return str(folder)


def create(data_dir, name="coco", batch_size=2, **options):
    steps = {"seed": 1, "iterations": 4, "period": 2}
    return create_detection_data(name, data_dir=data_dir, batch_size=batch_size, **steps, **{**CPU, **options})


def same(one, other):
    """Whether two lists of tensors are equal."""
    return len(one) == len(other) and all(map(torch.equal, one, other))


def same_batch(one, other):
    columns = ("images", "boxes", "labels")
    return one.iteration == other.iteration and all(same(getattr(one, key), getattr(other, key)) for key in columns)


# annotations


def test_boxes_are_corners_within_the_image_and_labels_follow_the_ids():
    boxes = [box_of([1, 2, 3, 4]), box_of([-5, 7, 100, 100], category=2), box_of([0.5, 0, 1.25, 8], image=12)]
    split, categories = annotated(checked_annotations(content_of([(20, 10)] * 3, boxes), "here"))
    assert categories.ids == [2, 9] and categories.names == ["dog", "cat"]
    assert same(split.boxes, [torch.tensor([[1.0, 2, 4, 6], [0, 7, 20, 10]]), torch.zeros(0, 4),
                              torch.tensor([[0.5, 0, 1.75, 8]])])  # fmt: skip
    assert same(split.labels, [torch.tensor([2, 1]), torch.tensor([], dtype=torch.int64), torch.tensor([2])])
    assert split.ids == [10, 11, 12] and split.sizes.tolist() == [[10, 20]] * 3
    assert {each.dtype for each in split.boxes} == {torch.float32} and {e.dtype for e in split.labels} == {torch.int64}


def test_crowds_and_boxes_without_width_or_height_are_only_in_the_ground_truth():
    boxes = [box_of([0, 0, 9, 9], iscrowd=1), box_of([1, 1, 0, 5]), box_of([1, 1, 5, -2]), box_of([30, 1, 5, 5]),
             box_of([1, 1, 5, 5], area=7)]  # fmt: skip
    split, _ = annotated(checked_annotations(content_of([(20, 10)], boxes), "here"))
    assert split.boxes[0].tolist() == [[1, 1, 6, 6]] and split.left_out == 3
    truth = split.ground_truth["annotations"]
    assert [each["iscrowd"] for each in truth] == [1, 0, 0, 0, 0] and [each["id"] for each in truth] == [1, 2, 3, 4, 5]
    assert truth[4]["area"] == 7 and truth[0]["area"] == 81


def test_what_is_left_out_is_told_once(tmp_path, capsys):
    data_dir = write(tmp_path, boxes=[box_of([0, 0, 3, 3]), box_of([0, 0, 3, 3], image=11), box_of([1, 1, 0, 5])])
    create(data_dir)
    assert capsys.readouterr().out.count("1 boxes of train2017 have no width or height") == 1
    create(data_dir, rank=1, world_size=2)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "is no JSON file"),
        ("[]", "has no list of images"),
        ({"annotations": None}, "has no list of annotations"),
        ({"categories": []}, "has no list of categories"),
        ({"images": [1]}, "number 1 of the images needs id, an integer"),
        ({"annotations": [{"image_id": 10, "category_id": 9}]}, "number 1 of the annotations needs bbox, a list"),
        ({"categories": [{"id": "9", "name": "cat"}]}, "number 1 of the categories needs id, an integer"),
        ({"categories": CATEGORIES + CATEGORIES[:1]}, "several categories with the same id"),
        ({"images": content_of([(0, 8)])["images"]}, "impossible height or width"),
        ({"annotations": [box_of([0, 0, 1, 1], image=77)]}, "is of image 77, which is not listed"),
        ({"annotations": [box_of([0, 0, 1, 1], category=3)]}, "is of category 3, which is not listed"),
        ({"annotations": [box_of([0, 0, 1])]}, "is not four numbers"),
        ({"annotations": [box_of([0, 0, 1, "1"])]}, "is not four numbers"),
        ({"annotations": [box_of([0, 0, 1, float("nan")])]}, "is not four numbers"),
        ({"annotations": [box_of([0, 0, 1, 10**400])]}, "is not four numbers"),
        ({"annotations": [box_of([0, 0, 5, 5], iscrowd=1)]}, "have no boxes"),
    ],
)
def test_wrong_annotations_are_explained(tmp_path, change, message):
    content = change if isinstance(change, str) else content_of([(8, 6), (6, 8)]) | change
    assert message in error_of(create, write(tmp_path, content=content))


def test_missing_files_are_explained(tmp_path):
    assert "--data_dir is missing" in error_of(create, None)
    assert "there is no file" in error_of(create, str(tmp_path))
    data_dir = write(tmp_path, sizes=[(8, 6)] * 3)
    (tmp_path / "train2017" / "1.png").unlink()
    (tmp_path / "train2017" / "2.png").unlink()
    assert "2 of the 3 images" in (message := error_of(create, data_dir)) and "the first is 1.png" in message
    (tmp_path / "train2017").rename(tmp_path / "elsewhere")
    assert "No such file or directory" in error_of(create, data_dir)


def test_an_image_may_be_in_a_folder_of_its_own(tmp_path):
    write(tmp_path)
    (tmp_path / "val2017" / "more").mkdir()
    (tmp_path / "val2017" / "0.png").rename(tmp_path / "val2017" / "more" / "0.png")
    file = tmp_path / "annotations" / "instances_val2017.json"
    file.write_text(file.read_text().replace('"0.png"', '"more/0.png"'))
    split, _ = read_coco(file, tmp_path / "val2017")
    assert split.read(0).shape == (3, 6, 8)


def test_unknown_names_and_different_categories_are_explained(tmp_path):
    assert "unknown data set 'voc'; the known ones are: coco, shapes" in error_of(create, None, "voc")
    data_dir = write(tmp_path)
    file = tmp_path / "annotations" / "instances_val2017.json"
    file.write_text(file.read_text().replace('"cat"', '"lion"'))
    assert "different categories" in error_of(create, data_dir)


# pixels


@pytest.mark.parametrize(("mode", "colour"), [("RGB", (10, 60, 200)), ("L", (200,) * 3), ("CMYK", (245, 195, 55))])
def test_images_are_rgb_from_0_to_1(tmp_path, mode, colour):
    batch = next(iter(create(write(tmp_path, mode=mode)).val))
    assert [tuple(image.shape) for image in batch.images] == [(3, 6, 8), (3, 8, 6)]
    assert {image.dtype for image in batch.images} == {torch.float32}
    assert torch.equal(batch.images[0][:, 5, 7] * 255, torch.tensor(colour).float())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_image_that_cannot_be_read_is_named_when_it_is_needed(tmp_path, num_workers):
    data = create(write(tmp_path), num_workers=num_workers)
    (tmp_path / "train2017" / "1.png").write_text("no image")
    assert "train2017/1.png cannot be read (it is no image" in error_of(list, data.train)
    Image.new("RGB", (5, 5)).save(tmp_path / "train2017" / "1.png")
    assert "1.png is 5 x 5 pixels, and by its annotations 6 x 8" in error_of(list, data.train)


# the order


def test_batches_are_landscape_or_portrait_while_there_are_enough():
    sizes = [(9, 6)] * 10 + [(6, 9)] * 7 + [(6, 6)] * 2  # two batches of 10 landscape, two of 9 other images, one mixed
    loader = loader_of(split_of(sizes), num_workers=0)
    batches, flipped = loader.draw_pass(0)
    assert batches.shape == flipped.shape == (4, 4)  # 19 images; the 2 and the 1 that are left fill no batch
    wide = (batches < 10).sum(1)
    assert sorted(wide.tolist()) == [0, 0, 4, 4] and len(batches.unique()) == 16
    batches, _ = loader_of(split_of(sizes[1:] + [(6, 6)] * 4), batch_size=5).draw_pass(0)
    *pure, mixed = sorted((batches < 9).sum(1).tolist(), key=lambda count: (count not in (0, 5), count))
    assert pure == [0, 0, 5] and 2 <= mixed <= 4 and len(batches.unique()) == 20  # 5 of the other 4 + 3 images


def test_every_image_is_left_out_of_some_passes_only():
    loader = loader_of(split_of([(9, 6)] * 5 + [(6, 9)] * 5), batch_size=3)  # 3 + 3 + 3 of the other 2 + 2
    passes = [set(loader.draw_pass(number)[0].flatten().tolist()) for number in range(60)]
    assert {len(drawn) for drawn in passes} == {9}
    assert set.intersection(*passes) == set() and set.union(*passes) == set(range(10))


def test_seed_and_iteration_determine_a_batch():
    split, whole = split_of([(8, 6)] * 9), {}
    for period in (10, 7):
        loader = loader_of(split, iterations=25, period=period)
        epochs = [loader.epoch(number) for number in range(1, -(-25 // period) + 1)]
        batches = [batch for epoch in epochs for batch in epoch]
        assert [batch.iteration for batch in batches] == list(range(25)) == list(range(sum(map(len, epochs))))
        whole[period] = batches
    assert all(map(same_batch, *whole.values()))
    other = loader_of(split, iterations=25).with_seed(2)
    assert [b.index.tolist() for b in other] != [b.index.tolist() for b in whole[10][:10]]
    assert all(map(same_batch, other.with_seed(1), whole[10]))


@pytest.mark.parametrize("start", [0, 1, 4, 9, 10])
def test_a_resumed_epoch_goes_on_with_the_same_batches(start):
    loader = loader_of(split_of([(8, 6)] * 9))
    rest = loader.epoch(2, start)
    batches = list(rest)
    assert len(batches) == len(rest) == 10 - start
    assert all(map(same_batch, batches, list(loader.epoch(2))[start:]))


def test_threads_and_processes_do_not_change_the_batches():
    split = split_of([(8, 6)] * 9)
    state = torch.get_rng_state()
    whole = list(loader_of(split))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(same_batch, whole, loader_of(split, num_workers=3)))
    for batch, *shares in zip(whole, *(loader_of(split, rank=i, world_size=2) for i in (0, 1)), strict=True):
        assert [len(share) for share in shares] == [2, 2]
        assert sorted(torch.cat([share.index for share in shares]).tolist()) == sorted(batch.index.tolist())
        assert same(shares[0].images, batch.images[::2]) and same(shares[1].boxes, batch.boxes[1::2])


def test_a_flipped_image_has_flipped_boxes():
    boxes = [box_of([1, 2, 3, 4]), box_of([0, 0, 8, 6], category=2), box_of([0.5, 1, 7, 2], image=11)]
    split = split_of([(8, 6)] * 2, boxes)
    for i in (0, 1):  # white where the first box is
        left, top, right, bottom = split.boxes[i][0].ceil().int().tolist()
        split.pixels[i] = 0
        split.pixels[i, :, top:bottom, left:right] = 255
    (batch, *_), (plain, *_) = loader_of(split, 2, flip=1.0), loader_of(split, 2, flip=0.0)
    assert same([image.flip(2) for image in batch.images], plain.images) and same(batch.labels, plain.labels)
    first, second = (batch.boxes[i] for i in batch.index.argsort().tolist())
    assert first.tolist() == [[4, 2, 7, 6], [0, 0, 8, 6]] and second.tolist() == [[0.5, 1, 7.5, 3]]
    white = batch.images[batch.index.tolist().index(0)][0].nonzero()
    assert white.amin(0).tolist() == [2, 4] and white.amax(0).tolist() == [5, 6]
    flips = loader_of(split_of([(8, 6)] * 400), 4).draw_pass(0)[1]
    assert 0.4 < flips.float().mean() < 0.6


def test_images_without_boxes_are_trained_on_if_asked():
    split = split_of([(8, 6)] * 5, [box_of([1, 1, 3, 3], image=image) for image in (10, 11, 13)])
    loader = loader_of(split, 3)
    assert loader.num_samples == 3 and {i for b in loader for i in b.index.tolist()} == {0, 1, 3}
    assert len(loader.target) == 5 == loader_of(split, 3, keep_empty=True).num_samples
    batch = next(iter(loader_of(split, 5, keep_empty=True)))
    assert sorted(map(len, batch.boxes)) == [0, 0, 1, 1, 1] and batch.target.tolist() == [2, 2, 2]
    assert {tuple(boxes.shape[1:]) for boxes in batch.boxes} == {(4,)} and len(batch) == 5
    assert "there are 3 training images with boxes, fewer than a batch of 4" in error_of(loader_of, split, 4)
    assert "there are 5 training images, fewer than a batch of 6" in error_of(loader_of, split, 6, keep_empty=True)


def test_blended_images_are_refused():
    assert "cannot be blended" in error_of(loader_of(split_of([(8, 6)] * 4)).epoch, 1, partner=torch.arange(4))


class Counted(AnnotatedImages):
    """Counts how many images were read."""

    reads = 0

    def read(self, index):
        Counted.reads += 1
        return super().read(index)


def test_threads_work_a_few_batches_ahead_and_end_with_the_iterator(monkeypatch):
    monkeypatch.setattr(Counted, "reads", 0)
    before = threading.active_count()
    batches = iter(loader_of(Counted(*split_of([(8, 6)] * 8)), num_workers=2))
    next(batches)
    assert threading.active_count() > before
    batches.close()  # which waits for the threads
    assert threading.active_count() == before and 4 <= Counted.reads <= 4 * (1 + AHEAD)


def test_validation_images_come_in_order_and_once():
    split = split_of([(8, 6)] * 7)
    batches = list(DetectionTestLoader(split, 3, **CPU))
    assert [batch.index.tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    assert torch.equal(batches[2].images[0] * 255, split.pixels[6].float()) and same(batches[2].boxes, split.boxes[6:])
    shares = [DetectionTestLoader(split, 2, rank=rank, world_size=2, **CPU) for rank in (0, 1)]
    assert [len(share) for share in shares] == [2, 2] == [len(list(share)) for share in shares]
    assert [i for share in shares for b in share for i in b.index.tolist()] == [0, 2, 4, 6, 1, 3, 5]
    assert list(DetectionTestLoader(split, 2, rank=8, world_size=9, **CPU)) == []


# the sets


def test_a_set_is_identified_by_annotations_and_images(tmp_path):
    assert identify_detection_data("shapes", None) is None is identify_detection_data("coco", str(tmp_path))
    data_dir = write(tmp_path)
    hashes = [identify_detection_data("coco", data_dir)]
    (tmp_path / "train2017" / "notes.txt").touch()
    (tmp_path / "train2017" / "._0.png").touch()
    assert identify_detection_data("coco", data_dir) == hashes[0]
    image, file = tmp_path / "val2017" / "0.png", tmp_path / "annotations" / "instances_val2017.json"
    for path in (image, file):
        path.write_bytes(path.read_bytes() + b" ")
        hashes.append(identify_detection_data("coco", data_dir))
    image.rename(tmp_path / "val2017" / "1_.png")
    assert len({*hashes, identify_detection_data("coco", data_dir)}) == 4


def test_shapes_touch_their_boxes():
    for kind in shapes.KINDS:
        for side in (14, 15, 40):
            inside = shapes.mask(kind, side)
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
            assert torch.equal(inside, inside.flip(1))
    areas = [shapes.mask(kind, 40).sum() / 1600 for kind in shapes.KINDS]
    assert areas == pytest.approx([1, torch.pi / 4, 0.5], abs=0.03)


def test_shapes_are_the_same_in_every_process_and_others_for_validation():
    data = create(None, "shapes", batch_size=8)
    train, val = data.train.split, data.val.split
    again, _ = shapes.make(60, 0)
    assert torch.equal(train.pixels, again) and train.pixels.shape == val.pixels.shape == (60, 3, 96, 96)
    assert not (train.pixels == val.pixels).all((1, 2, 3)).any()
    assert (
        data.num_classes == 3 and data.class_names == ["square", "disc", "triangle"] and data.category_ids == [1, 2, 3]
    )
    boxes = torch.cat(train.boxes)
    assert {len(each) for each in train.boxes} == {1, 2, 3} and set(torch.cat(train.labels).tolist()) == {1, 2, 3}
    assert (boxes[:, 2:] - boxes[:, :2]).min() >= 14 and (boxes[:, 2:] - boxes[:, :2]).max() <= 40
    left, top, right, bottom = train.boxes[0][-1].int().tolist()  # of the smallest shape, which is in front
    inside = shapes.mask(data.class_names[train.labels[0][-1] - 1], right - left)
    colours = train.pixels[0, :, top:bottom, left:right][:, inside]
    assert torch.equal(colours, colours[:, :1].expand_as(colours))


@pytest.mark.skipif(not TINY80.is_dir(), reason="the 160 images of COCO are not here")
def test_real_images_of_coco():
    data = create(str(TINY80), batch_size=4, num_workers=2)
    assert data.num_classes == 80 and data.category_ids[-1] == 90 and data.class_names[0] == "person"
    for split, boxes in ((data.train.split, 705 - 6), (data.val.split, 815 - 11)):
        assert len(split.ids) == 80 and sum(map(len, split.boxes)) == boxes and split.left_out == 0
    assert len(data.val_truth["annotations"]) == 815
    batch = next(iter(data.train))
    ratios = [image.shape[1] >= image.shape[2] for image in batch.images]
    assert len(set(ratios)) == 1 and 0.1 < torch.cat([image.flatten() for image in batch.images]).mean() < 0.9
    assert identify_detection_data("coco", str(TINY80)) is not None
