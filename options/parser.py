"""The argument parser of all scripts."""

import argparse
from typing import NoReturn

from inputs import UserError


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UserError, with a message of one sentence, instead of exiting."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (python {self.prog} --help lists the flags)")
