"""The argument parser of all scripts."""

import argparse
from typing import NoReturn

from inputs import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (python {self.prog} --help lists the flags)")
