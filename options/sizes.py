"""Check the sizes in the options against the device's memory, before anything is allocated."""

import torch

from distiller_zoo import distiller_dict
from inputs import CPU, TRAINED, check_fits
from models import create_model
from options.detector import DetectorOptions
from options.flags import CommonOptions, StudentOptions, as_dict
from temperature import temperature_dict


def check_sizes(options: CommonOptions | DetectorOptions, device: torch.device = CPU) -> None:
    """Raise UserError if the sizes in the options do not fit into a device's memory."""
    if isinstance(options, DetectorOptions):
        side = options.max_size
        check_fits(f"a batch of {options.batch_size} images", options.batch_size * 3 * side**2 * 4,
                   "--batch_size or --max_size", device)  # fmt: skip
        return
    batch, side, trials, name = options.batch_size, options.image_size, options.trials, getattr(options, "model", "")
    check_fits(f"a batch of {batch} images", batch * 3 * side**2 * 4, "--batch_size or --image_size", device)
    if isinstance(options, StudentOptions):
        name, given = options.model_s, as_dict(options)
        for method in (distiller_dict[options.distill], temperature_dict[options.temperature]):
            method.check(given, device)
    if trials > 1:
        with torch.device("meta"):  # allocates nothing
            model = create_model(name, 1, options.dataset)
        size = TRAINED * trials * sum(parameter.numel() for parameter in model.parameters())
        check_fits(f"{trials} networks, trained side by side,", size, "--trials", device)
