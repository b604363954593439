"""The 1,797 handwritten digits that come with scikit-learn, for trying things out without a download."""

import torch
import torch.nn.functional as F

from dataset.memory import ImageSet

MEAN = (0.3054,) * 3  # of the training images
STD = (0.3237,) * 3


def load(**_: object) -> ImageSet:
    """Load the 8x8 digits as 32x32 pixels in three equal channels; a fixed fifth of each class is for validation."""
    from sklearn.datasets import load_digits  # slow to import, and only needed here
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    ink = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)  # [N, 1, 8, 8], from 0 to 16 originally
    images = F.interpolate(ink, size=(32, 32), mode="bilinear").round().byte().expand(-1, 3, -1, -1)
    target = torch.from_numpy(digits.target).long()
    train, val = train_test_split(torch.arange(len(target)), test_size=0.2, stratify=target, random_state=0)
    return ImageSet(
        images[train],
        target[train],
        images[val],
        target[val],
        num_classes=10,
        mean=MEAN,
        std=STD,
        flip=False,
        class_names=[str(digit) for digit in digits.target_names],
    )
