"""Distillers: losses that compare teacher and student. To add one, write a file like `kd.py` and a line here."""

from collections.abc import Callable
from typing import Any

from distiller_zoo.ab import AB, ab_loss
from distiller_zoo.at import AT, at_loss
from distiller_zoo.base import Distiller, at_least_float32, warmed_up
from distiller_zoo.cat_kd import CATKD, cat_loss
from distiller_zoo.cc import CC, cc_loss
from distiller_zoo.cka import linear_cka, minibatch_cka
from distiller_zoo.crd import CRD, nce_loss
from distiller_zoo.cskd import CSKD, cskd_loss
from distiller_zoo.dist import DIST, dist_loss
from distiller_zoo.dkd import DKD, dkd_loss
from distiller_zoo.dpk import DPK
from distiller_zoo.fsp import FSP, fsp_loss, fsp_matrix
from distiller_zoo.ft import FT, ft_loss
from distiller_zoo.hint import Hint, hint_loss
from distiller_zoo.ickd import ICKD, ickd_loss
from distiller_zoo.itrd import ITRD, itrd_correlation_loss, itrd_mutual_loss
from distiller_zoo.kd import KD, kd_loss
from distiller_zoo.kdsvd import KDSVD, kdsvd_loss
from distiller_zoo.mlkd import MLKD, batch_correlation_loss, class_correlation_loss
from distiller_zoo.nkd import NKD, nkd_loss
from distiller_zoo.nst import NST, nst_loss
from distiller_zoo.ofd import OFD, ofd_loss, ofd_margin
from distiller_zoo.pkt import PKT, pkt_loss
from distiller_zoo.reviewkd import ReviewKD, hcl_loss
from distiller_zoo.rkd import RKD, rkd_loss
from distiller_zoo.rld import RLD, rld_loss
from distiller_zoo.sdd import SDD, sdd_dkd_loss, sdd_kd_loss, sdd_logits
from distiller_zoo.simkd import SimKD, simkd_loss
from distiller_zoo.skd import SKD, skd_loss
from distiller_zoo.sp import SP, sp_loss
from distiller_zoo.srd import SRD, srd_loss
from distiller_zoo.srrl import SRRL
from distiller_zoo.swap import Swap, swap_target
from distiller_zoo.two_stage import TwoStage
from distiller_zoo.vid import VID, vid_loss
from distiller_zoo.wsld import WSLD, wsld_loss
from inputs import unknown

__all__ = [
    "Distiller", "TwoStage", "ab_loss", "at_least_float32", "at_loss", "batch_correlation_loss", "cat_loss",
    "cc_loss", "class_correlation_loss", "create_distiller", "cskd_loss", "dist_loss", "distiller_dict", "dkd_loss",
    "fsp_loss", "fsp_matrix", "ft_loss", "hcl_loss", "hint_loss", "ickd_loss", "itrd_correlation_loss",
    "itrd_mutual_loss", "kd_loss", "kdsvd_loss", "linear_cka", "minibatch_cka", "nce_loss", "nkd_loss", "nst_loss",
    "ofd_loss", "ofd_margin", "pkt_loss", "rkd_loss", "rld_loss", "sdd_dkd_loss", "sdd_kd_loss", "sdd_logits",
    "simkd_loss", "skd_loss", "sp_loss", "srd_loss", "swap_target", "vid_loss", "warmed_up", "wsld_loss",
]  # fmt: skip

distiller_dict: dict[str, Callable[..., Distiller]] = {
    "kd": KD,
    "pkt": PKT,
    "sp": SP,
    "vid": VID,
    "crd": CRD,
    "srrl": SRRL,
    "dkd": DKD,
    "dpk": DPK,
    "at": AT,
    "rkd": RKD,
    "hint": Hint,
    "nst": NST,
    "cc": CC,
    "dist": DIST,
    "rld": RLD,
    "nkd": NKD,
    "wsld": WSLD,
    "ickd": ICKD,
    "srd": SRD,
    "mlkd": MLKD,
    "cskd": CSKD,
    "kdsvd": KDSVD,
    "reviewkd": ReviewKD,
    "ofd": OFD,
    "simkd": SimKD,
    "cat_kd": CATKD,
    "sdd": SDD,
    "skd": SKD,
    "itrd": ITRD,
    "swap": Swap,
    "ft": FT,
    "ab": AB,
    "fsp": FSP,
}


def create_distiller(name: str, **options: Any) -> Distiller:
    """Return the distiller `name`, constructed with `options`. Raises UserError for an unknown name."""
    if name not in distiller_dict:
        raise unknown("distiller", name, distiller_dict)
    return distiller_dict[name](**options)
