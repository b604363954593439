"""Checks that what the options decide fits into memory, before it is allocated."""

import torch

from helper.flags import CommonOptions, StudentOptions
from inputs import CPU, TRAINED, check_fits
from models import create_model


def check_sizes(options: CommonOptions, device: torch.device = CPU) -> None:
    """Check that what the options alone decide fits into the memory of a device. Raises InputError."""
    batch, side, trials = options.batch_size, options.image_size, options.trials
    check_fits(f"a batch of {batch} images", batch * 3 * side**2 * 4, "--batch_size or --image_size", device)
    if (
        isinstance(options, StudentOptions) and options.distill == "crd"
    ):  # of each: its place, a random number, its score, and their gradients
        check_fits(
            "CRD's negatives of a batch", batch * options.method["nce_k"] * 40, "--nce_k or --batch_size", device
        )
    if isinstance(options, StudentOptions) and options.temperature == "ctkd-instance":
        size = batch * options.method["instance_width"] * 8
        check_fits("CTKD's hidden units", size, "--instance_width or --batch_size", device)
    if trials > 1:
        with torch.device("meta"):  # without memory
            name = options.model_s if isinstance(options, StudentOptions) else options.model
            model = create_model(name, 1, options.dataset)
        size = TRAINED * trials * sum(parameter.numel() for parameter in model.parameters())
        check_fits(f"{trials} networks, trained side by side,", size, "--trials", device)
