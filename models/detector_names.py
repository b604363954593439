"""The names of the detectors, apart from the networks themselves, whose library takes seconds to import."""

DETECTORS = (
    "faster_rcnn_ResNet18", "faster_rcnn_ResNet34", "faster_rcnn_ResNet50", "faster_rcnn_ResNet101",
    "faster_rcnn_MobileNetV2", "faster_rcnn_ResNet50_v2", "retinanet_ResNet18", "retinanet_ResNet34",
    "retinanet_ResNet50", "retinanet_ResNet101", "faster_rcnn_tiny", "faster_rcnn_tiny_wide", "retinanet_tiny",
    "retinanet_tiny_wide",
)  # fmt: skip
