"""Conventional training loops, the baselines for ours in the benchmarks.

All of them train KD with CTKD's global temperature in the common way: worker processes crop and flip images one at a
time by PIL; networks run eagerly in PyTorch's default memory format; the teacher runs on every image of every epoch;
losses and accuracies are read back from the device while training. They differ, like the code bases that they follow,
in how and how often they read back, how they show progress, what a batch holds, and the loaders' settings. Workers
persist over epochs in all of them, which favours the baselines if epochs are short.
"""

import io
import time
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision import transforms
from tqdm import tqdm

from models import Model
from temperature import create_temperature

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
CE, KD = 0.1, 0.9  # weights of the loss
PRINTED_EVERY = 100  # steps


class Images(TorchDataset):
    """Images [N, H, W, 3] uint8 and classes [N], transformed one at a time; with `indexed`, each has its index too."""

    def __init__(self, images: Tensor, target: Tensor, transform: transforms.Compose, indexed: bool = False) -> None:
        self.images, self.target, self.transform = images.numpy(), target.tolist(), transform
        self.indexed = indexed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | tuple[Tensor, int, int]:
        sample = self.transform(Image.fromarray(self.images[index])), self.target[index]
        return (*sample, index) if self.indexed else sample


class Meter:
    """A running mean, of numbers or of tensors that stay on the device until they are printed."""

    def __init__(self) -> None:
        self.sum: float | Tensor = 0.0
        self.count = 0

    def update(self, value: float | Tensor, count: int = 1) -> None:
        """Add a value that is the mean of `count` samples."""
        self.sum, self.count = self.sum + value * count, self.count + count

    @property
    def mean(self) -> float | Tensor:
        """Return the mean so far."""
        return self.sum / self.count


def accuracy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return top-1 and top-5 accuracy in percent, as scalars on the device."""
    correct = logits.topk(5, 1).indices.t().eq(target.view(1, -1).expand(5, -1))
    top1, top5 = (correct[:k].reshape(-1).float().sum() * 100.0 / len(target) for k in (1, 5))
    return top1, top5


class Baseline:
    """A conventional loop: loss and both accuracies are read back in every step.

    Args:
        teacher: network, set to evaluation mode.
        student: network to train.
        images: [N, H, W, 3] uint8.
        target: [N] int64.
        batch_size: images in a training batch.
        workers: worker processes of the training loader; 0: none.
        device: the device of both networks.
    """

    indexed = False  # whether batches hold the images' indices
    pinned = True  # whether loaders use page-locked memory

    def __init__(
        self, teacher: Model, student: Model, images: Tensor, target: Tensor, batch_size: int, workers: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        torch.backends.cudnn.benchmark = True  # common practice
        self.teacher, self.student, self.device = teacher.to(device).eval(), student.to(device), device
        self.temperature = create_temperature("ctkd-global").to(device)
        self.temperature.start_epoch(10)
        self.optimizer = torch.optim.SGD(
            nn.ModuleList([student, self.temperature]).parameters(), 0.01, momentum=0.9, weight_decay=5e-4
        )
        as_tensor = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        augment = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *as_tensor]
        val_size, val_workers = self.of_validation(batch_size, workers)
        train = Images(images, target, transforms.Compose(augment), self.indexed)
        self.train_loader = self._loader(train, batch_size, workers, shuffle=True)
        self.val_loader = self._loader(Images(images, target, transforms.Compose(as_tensor)), val_size, val_workers)

    def of_validation(self, batch_size: int, workers: int) -> tuple[int, int]:
        """Return batch size and workers of validation, given those of training."""
        return max(batch_size // 2, 1), workers

    def _loader(self, images: Images, batch_size: int, workers: int, shuffle: bool = False) -> DataLoader:
        context = "fork" if workers else None
        return DataLoader(
            images, batch_size, shuffle, num_workers=workers, pin_memory=self.pinned and self.device.type == "cuda",
            persistent_workers=workers > 0, multiprocessing_context=context,
        )  # fmt: skip

    def loss(self, logits: Tensor, said: Tensor, target: Tensor) -> Tensor:
        """Return 0.1 cross entropy + 0.9 tau^2 KL of logits [B, C], the teacher's logits [B, C] and classes [B]."""
        tau = self.temperature(logits, said, target, target).student
        soft = F.kl_div(F.log_softmax(logits / tau, 1), F.softmax(said / tau, 1), reduction="batchmean") * tau**2
        return CE * F.cross_entropy(logits, target) + KD * soft

    def train(self) -> None:
        """Train one epoch."""
        self.student.train()
        shown = []
        for images, target in self.train_loader:
            images, target = images.to(self.device), target.to(self.device)
            with torch.no_grad():
                said = self.teacher(images)
            logits = self.student(images)
            loss = self.loss(logits, said, target)
            self._learn(loss)
            shown.append((loss.item(), *(each.item() for each in accuracy(logits, target))))

    def _learn(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def validate(self) -> None:
        """Evaluate on all images without augmentation."""
        self.student.eval()
        shown = []
        for images, target in self.val_loader:
            images, target = images.to(self.device), target.to(self.device)
            logits = self.student(images)
            shown.append((F.cross_entropy(logits, target).item(), *(each.item() for each in accuracy(logits, target))))


class RepDistillerStyle(Baseline):
    """A loop in the style of RepDistiller (Tian et al., 2020), from which the code of CTKD comes.

    It keeps five running means, and reads the loss back between the forward and the backward pass, the accuracies every
    hundred steps. Both networks return their features too, and a batch holds the images' indices. Memory is not
    page-locked. Validation uses half the batch size and half the workers.
    """

    indexed, pinned = True, False

    def of_validation(self, batch_size: int, workers: int) -> tuple[int, int]:
        return max(batch_size // 2, 1), workers // 2

    def train(self) -> None:
        """Train one epoch."""
        self.student.train()
        self.teacher.eval()
        meters = {name: Meter() for name in ("batch", "data", "loss", "top1", "top5")}
        since = time.perf_counter()
        for number, (images, target, index) in enumerate(self.train_loader):
            meters["data"].update(time.perf_counter() - since)
            images, target, index = (each.to(self.device) for each in (images.float(), target, index))
            _, logits = self.student(images, is_feat=True)
            with torch.no_grad():
                features, said = self.teacher(images, is_feat=True)
                features = [feature.detach() for feature in features]
            loss = self.loss(logits, said, target)
            self._note(meters, loss, logits, target)
            self._learn(loss)
            meters["batch"].update(time.perf_counter() - since)
            since = time.perf_counter()
            self._show(number, meters)

    @torch.no_grad()
    def validate(self) -> None:
        """Evaluate on all images without augmentation."""
        self.student.eval()
        meters = {name: Meter() for name in ("batch", "loss", "top1", "top5")}
        since = time.perf_counter()
        for number, (images, target) in enumerate(self.val_loader):
            images, target = images.float().to(self.device), target.to(self.device)
            logits = self.student(images)
            self._note(meters, F.cross_entropy(logits, target), logits, target)
            meters["batch"].update(time.perf_counter() - since)
            since = time.perf_counter()
            self._show(number, meters)

    def _note(self, meters: dict[str, Meter], loss: Tensor, logits: Tensor, target: Tensor) -> None:
        top1, top5 = accuracy(logits, target)
        meters["loss"].update(loss.item(), len(target))
        meters["top1"].update(top1, len(target))
        meters["top5"].update(top5, len(target))

    def _show(self, number: int, meters: dict[str, Meter]) -> None:
        if number % PRINTED_EVERY == 0:
            print(number, *(f"{name} {meter.mean:.3f}" for name, meter in meters.items()), flush=True)


class _Distiller(nn.Module):
    """Teacher, student and loss in one module, called once a step."""

    def __init__(self, loop: Baseline) -> None:
        super().__init__()
        self.student, self.teacher, self.temperature = loop.student, loop.teacher, loop.temperature

    def train(self, mode: bool = True) -> "_Distiller":
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, image: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits, (_, said) = self.student(image), self._taught(image)
        tau = self.temperature(logits, said, target, target).student
        each = F.kl_div(F.log_softmax(logits / tau, 1), F.softmax(said / tau, 1), reduction="none").sum(1)
        return logits, {"ce": CE * F.cross_entropy(logits, target), "kd": KD * each.mean() * tau**2}

    @torch.no_grad()
    def _taught(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        features, logits = self.teacher(image, is_feat=True)
        return features, logits


class MdistillerStyle(Baseline):
    """A loop in the style of mdistiller's trainer (Zhao et al., 2022).

    One module, on a GPU in `DataParallel`, holds both networks and returns a dictionary of losses. In every step the
    loss is read back as an array, and the means are printed into the text of the progress bar, which is redrawn. A
    batch holds the images' indices. Memory is not page-locked. Validation uses the training's batch size and at most
    one worker.
    """

    indexed, pinned = True, False

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        module = _Distiller(self)
        on_gpu = self.device.type == "cuda"
        self.distiller = nn.DataParallel(module, [self.device.index or 0]) if on_gpu else module

    def of_validation(self, batch_size: int, workers: int) -> tuple[int, int]:
        return batch_size, min(workers, 1)

    def train(self) -> None:
        """Train one epoch."""
        self.distiller.train()
        self._with_bar(self.train_loader, self._train_step, ("data", "step", "loss", "top1", "top5"))

    @torch.no_grad()
    def validate(self) -> None:
        """Evaluate on all images without augmentation."""
        self.distiller.eval()
        self._with_bar(self.val_loader, self._test_step, ("loss", "top1", "top5"))

    def _with_bar(self, loader: DataLoader, step: Callable[..., None], names: Iterable[str]) -> None:
        meters = {name: Meter() for name in names}
        with tqdm(total=len(loader), file=io.StringIO()) as bar:  # drawn, but not shown
            for batch in loader:
                step(batch, meters)
                bar.set_description("| ".join(f"{name}: {meter.mean:.4f}" for name, meter in meters.items()))
                bar.update()

    def _train_step(self, batch: list[Tensor], meters: dict[str, Meter]) -> None:
        self.optimizer.zero_grad()
        since = time.perf_counter()
        image, target, index = batch
        meters["data"].update(time.perf_counter() - since)
        image, target, index = (each.to(self.device, non_blocking=True) for each in (image.float(), target, index))
        logits, losses = self.distiller(image, target)
        loss = sum(each.mean() for each in losses.values())
        loss.backward()
        self.optimizer.step()
        meters["step"].update(time.perf_counter() - since)
        self._note(meters, loss, logits, target)

    def _test_step(self, batch: list[Tensor], meters: dict[str, Meter]) -> None:
        image, target = (each.to(self.device, non_blocking=True) for each in batch)
        logits = self.student(image)
        self._note(meters, F.cross_entropy(logits, target), logits, target)

    def _note(self, meters: dict[str, Meter], loss: Tensor, logits: Tensor, target: Tensor) -> None:
        top1, top5 = accuracy(logits, target)
        meters["loss"].update(loss.cpu().detach().numpy().mean(), len(target))
        meters["top1"].update(top1, len(target))
        meters["top5"].update(top5, len(target))


LOOPS = {"field": Baseline, "repdistiller": RepDistillerStyle, "mdistiller": MdistillerStyle}
