"""The names of the detectors, in their own file because models/detection.py imports torchvision, which takes seconds.

`faster_rcnn_ResNet50_v2` is torchvision's second version (Li et al. 2021, 2111.11429), with more layers in the heads.
The tiny ones, for images of 96 pixels a side, train within a minute on a CPU; a `tiny_wide` is a teacher for a `tiny`.
"""

DETECTORS = (
    "faster_rcnn_ResNet18", "faster_rcnn_ResNet34", "faster_rcnn_ResNet50", "faster_rcnn_ResNet101",
    "faster_rcnn_MobileNetV2", "faster_rcnn_ResNet50_v2", "retinanet_ResNet18", "retinanet_ResNet34",
    "retinanet_ResNet50", "retinanet_ResNet101", "faster_rcnn_tiny", "faster_rcnn_tiny_wide", "retinanet_tiny",
    "retinanet_tiny_wide",
)  # fmt: skip


def pyramid_of(name: str) -> tuple[str, bool]:
    """Return a detector's family, and whether it is a tiny one; together they determine the levels of its maps."""
    return name.partition("_")[0], "tiny" in name
