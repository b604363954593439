"""Which options make a run what it is, and whether two runs are the same."""

from typing import Any

# Options that name, place or show a run and leave its result alone. The seed is none of them.
NEUTRAL_OPTIONS = frozenset((
    "trial", "experiments_dir", "experiments_name", "run_dir", "path_t", "model_t", "data_dir", "num_workers",
    "print_freq", "save_freq", "save_model", "overwrite", "dry_run", "train_teacher", "skip_validation", "device",
    "gpu_id", "dali", "dist_url", "dist_timeout", "multiprocessing_distributed", "dkd_weights", "plain", "trials",
    "teacher_table", "fill_teacher_table", "table_dir",
))  # fmt: skip

# Options that mean something to one distiller, or to one temperature, only; others' runs record them too.
OPTIONS_OF = {
    "dkd": ("dkd_alpha", "dkd_beta", "dkd_warmup"),
    "crd": ("feat_dim", "nce_k", "nce_t", "nce_m", "mode"),
    "dpk": (
        "dpk_stages",
        "dpk_patch",
        "dpk_width",
        "dpk_encoder_depth",
        "dpk_decoder_depth",
        "dpk_mask",
        "dpk_schedule",
        "dpk_momentum",
    ),
    "hint": ("hint_layer",),
}
_CTKD = ("tau_init", "tau_range", "curriculum", "lambda_min", "lambda_max", "lambda_epochs")
_POLICY = ("rl_warmup", "aug_epoch", "rl_tau_min", "rl_tau_max")
TEMPERATURE_OPTIONS_OF = {
    "ctkd-global": _CTKD,
    "ctkd-instance": (*_CTKD, "instance_width"),
    "dtkd": ("dtkd_detach",),
    "rlkd": (*_POLICY, "rl_epoch", "rl_rollout", "rl_calibration", "rl_max_kl"),
    "random": (*_POLICY, "random_mean", "random_std"),
    "annealing": ("anneal_from", "anneal_to", "anneal_shape"),
    "standardised": ("base_tau",),
}
# Options that there were not always, and what a run without them did.
ADDED_OPTIONS = {
    "fixed_alpha": 0.0, "kd_warmup": 0, "logit_stand": False, "precision": "fp32", "table_dtype": "float32",
    "teacher_precision": "fp32", "sync_bn": False, "rl_calibration": "learned", "rl_max_kl": 0.0,
}  # fmt: skip


def foreign_options(distill: str | None, temperature: str | None) -> set[str]:
    """The options that mean nothing to a run with this distiller and temperature, since they are another's."""
    tables = ((OPTIONS_OF, distill), (TEMPERATURE_OPTIONS_OF, temperature))
    every = {key for table, _ in tables for keys in table.values() for key in keys}
    return every - {key for table, name in tables for key in table.get(name, ())}


def decisive(options: dict[str, Any], distill: str | None, temperature: str | None) -> dict[str, Any]:
    """The options that can change the result of a run with this distiller and temperature."""
    left_out = NEUTRAL_OPTIONS | foreign_options(distill, temperature)
    return {key: value for key, value in options.items() if key not in left_out}


HASHES = {"data_sha256": "other data", "teacher_sha256": "another teacher"}  # and what is said where they differ


def differing(there: dict[str, Any], here: dict[str, Any]) -> str:
    """What two runs have in common and do otherwise, as a text; empty if nothing."""
    keys = differing_keys(there, here)
    return "; ".join(HASHES.get(key, f"{key} {there[key]} instead of {here[key]}") for key in keys)


def differing_keys(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What two runs have in common and do otherwise. A hash that is not known here, where the data was not given, or
    that was made by another version of the formula, does not count."""
    both = sorted(key for key in there.keys() & here.keys() if there[key] != here[key])
    return [
        key
        for key in both
        if key not in HASHES or here[key] is not None and hash_version(there[key]) == hash_version(here[key])
    ]


def hash_version(value: Any) -> str:
    """Which version of the formula made a hash: what stands before its colon, and "1" where there is none. Hashes of
    two versions say nothing about whether two data sets are the same; see dataset/tree.py."""
    return value.partition(":")[0] if isinstance(value, str) and ":" in value else "1"
