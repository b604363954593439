"""A conventional training loop, the baseline for ours in the benchmarks.

Worker processes crop and flip images one at a time by PIL; networks run eagerly in float32 and PyTorch's default memory
format; the teacher runs on every image of every epoch; loss and accuracy are read back from the device in every step;
validation uses half the batch size. Workers persist over epochs, which favours the baseline if epochs are short.
"""

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision import transforms

from models import Model
from temperature import create_temperature

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


class Images(TorchDataset):
    """Images [N, H, W, 3] uint8 and classes [N], transformed one at a time."""

    def __init__(self, images: Tensor, target: Tensor, transform: transforms.Compose) -> None:
        self.images, self.target, self.transform = images.numpy(), target.tolist(), transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.target[index]


def accuracy(logits: Tensor, target: Tensor) -> list[float]:
    """Return top-1 and top-5 accuracy in percent, read back from the device."""
    _, best = logits.topk(5, 1)
    correct = best.t().eq(target.view(1, -1).expand(5, -1))
    return [correct[:k].reshape(-1).float().sum().item() * 100.0 / len(target) for k in (1, 5)]


class Baseline:
    """Trains KD with CTKD's global temperature in a conventional loop: 0.1 cross entropy + 0.9 tau^2 KL, by SGD.

    Args:
        teacher: network, set to evaluation mode.
        student: network to train.
        images: [N, H, W, 3] uint8.
        target: [N] int64.
        batch_size: images in a training batch.
        workers: processes that decode.
        device: of both networks.
    """

    def __init__(
        self, teacher: Model, student: Model, images: Tensor, target: Tensor, batch_size: int, workers: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = True  # common practice; PyTorch's default
        self.teacher, self.student, self.device = teacher.to(device).eval(), student.to(device), device
        self.temperature = create_temperature("ctkd-global").to(device)
        self.temperature.start_epoch(10)
        self.optimizer = torch.optim.SGD(
            nn.ModuleList([student, self.temperature]).parameters(), 0.01, momentum=0.9, weight_decay=5e-4
        )
        as_tensor = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        augment = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *as_tensor]
        train = Images(images, target, transforms.Compose(augment))
        val = Images(images, target, transforms.Compose(as_tensor))
        common = {"num_workers": workers, "pin_memory": device.type == "cuda", "persistent_workers": workers > 0}
        if workers:
            common["multiprocessing_context"] = "fork"
        self.train_loader = DataLoader(train, batch_size, shuffle=True, **common)
        self.val_loader = DataLoader(val, max(batch_size // 2, 1), **common)

    def train(self) -> None:
        """Train one epoch."""
        self.student.train()
        shown = []
        for images, target in self.train_loader:
            images, target = images.to(self.device), target.to(self.device)
            with torch.no_grad():
                said = self.teacher(images)
            logits = self.student(images)
            tau = self.temperature(logits, said, target, target).student
            soft = F.kl_div(F.log_softmax(logits / tau, 1), F.softmax(said / tau, 1), reduction="batchmean") * tau**2
            loss = 0.1 * F.cross_entropy(logits, target) + 0.9 * soft
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            shown.append((loss.item(), *accuracy(logits, target)))

    def validate(self) -> None:
        """Evaluate on all images without augmentation."""
        self.student.eval()
        shown = []
        with torch.no_grad():
            for images, target in self.val_loader:
                images, target = images.to(self.device), target.to(self.device)
                logits = self.student(images)
                shown.append((F.cross_entropy(logits, target).item(), *accuracy(logits, target)))
