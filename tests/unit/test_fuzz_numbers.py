"""Nonsense for every number and name on the command lines is refused in one sentence or within bounds."""

import math
import sys

import pytest

import reproduce
from benchmarks import bench, cka_bias, cost, gpu_campaign, gpu_check, growth, loading, operations, sharing, startup
from distiller_zoo import distiller_dict
from inputs import UserError
from models import networks
from options.flags import all_options, as_dict, own_options, student_parser, teacher_parser
from options.parse import parse_student, parse_teacher
from options.parser import Parser
from temperature import temperature_dict

NONSENSE = (
    "nan", "-nan", "inf", "-inf", "infinity", "-1", "-0", "0", "-1e-300", "1e-320", "5e-324", "1e-30", "1e30", "1e308",
    "-1e308", "1e999", "9" * 30, "-" + "9" * 30, "9" * 400, "9" * 5000, "1" + "0" * 309, "0.99999999", "", " ", "1e",
    "0x10", "1_000", "1,5", "٣", "１６", "²", "½", "one", "None", "True", "\x00", "\ud800", "1\n2", "--", "%s", "{0}",
)  # fmt: skip
NAMES = (
    "", " ", "KD ", "kd\n", "Ａ", "ſp", "../kd", "kd,sp", "0", "nan", "None", "\x00", "\ud800", "%s", "{0}",
    "x" * 10_000,
)  # fmt: skip
MAKERS = {"teacher": teacher_parser, "student": student_parser}
PARSERS = {"train_teacher.py": parse_teacher, "train_student.py": parse_student}


def flags(parser, wanted):
    return [action for action in parser._actions if action.option_strings and action.nargs is None and wanted(action)]


def is_numeric(action):
    return action.type is not None and action.choices is None or action.dest in ("lr_decay_epochs", "dpk_schedule")


def context(dest):
    """Return the flags of a run in which the option has an effect."""
    distill = next((name for name in distiller_dict if dest in own_options(name, None)), "kd")
    temperature = next((name for name in temperature_dict if dest in own_options(None, name)), "fixed")
    return ["--distill", distill, "--temperature", temperature]


def outcome(parser, argv):
    """Return the resolved options, or None if they are refused with a readable message."""
    try:
        return PARSERS[parser.prog](argv)
    except UserError as error:
        assert error.status == 2
        assert str(error)
        return None


@pytest.mark.parametrize("name", MAKERS)
def test_numbers_are_refused_or_bounded(name):
    parser = MAKERS[name]()
    numeric = flags(parser, is_numeric)
    assert len(numeric) > (50 if name == "student" else 15)
    accepted = 0
    for i, action in enumerate(numeric):
        before = context(action.dest) if name == "student" else []
        for text in NONSENSE[i % 3 :: 3]:  # in turn, since all of them take long
            options = outcome(parser, [*before, f"{action.option_strings[0]}={text}"])
            accepted += options is not None
            for key, value in (as_dict(options) if options else {}).items():
                for number in value if isinstance(value, list) else [value]:
                    if isinstance(number, int | float):
                        assert math.isfinite(number) and abs(number) < 2**63, (action.dest, text, key)
                        vanishes = 0 < abs(number) < 1e-9  # in float32, next to the numbers it is combined with
                        assert not vanishes or key == "random_mean", (action.dest, text, key)
    assert accepted > 15  # 0, 1_000 and digits of other scripts are numbers


@pytest.mark.parametrize("name", MAKERS)
def test_every_number_has_two_bounds(name):
    parser = MAKERS[name]()
    for action in flags(parser, lambda action: action.type in (int, float) and action.choices is None):
        option = all_options()["learning_rate" if action.dest == "lr" else action.dest].option
        least, most = option.least, option.most
        assert -math.inf < least < most < math.inf
        for text in (str(most * 2), str(least - 1), "nan"):
            number = text.partition(".")[0] if action.type is int else text
            with pytest.raises(UserError) as error:
                PARSERS[parser.prog](
                    [*(context(action.dest) if name == "student" else []), f"--{action.dest}={number}"]
                )
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", MAKERS)
def test_names_are_refused(name):
    parser = MAKERS[name]()
    free = {"data_dir", "trial", "experiments_dir", "experiments_name", "run_dir", "path_t", "table_dir", "device",
            "gpu_id", "dist_url", "init_weights"}  # fmt: skip
    named = flags(parser, lambda action: not is_numeric(action) and action.dest not in free)
    assert len(named) > (10 if name == "student" else 3)
    for action in named:
        for text in NAMES:
            argv = [f"{action.option_strings[0]}={text}"]
            if action.dest in ("curriculum", "anneal_shape"):
                argv += context(action.dest)
            if action.dest == "temperature" and not text:  # the same as leaving it out
                continue
            assert outcome(parser, argv) is None or (action.dest, text) == ("have_mlp", "0"), (action.dest, text)


def test_names_of_networks_and_distillers_may_be_written_in_any_case():
    for dataset in ("cifar100", "imagenet"):
        for known in networks(dataset):
            line = ["--dataset", dataset, "--model_s", known.upper(), "--model_t", known.lower()]
            options = parse_student(line)
            assert (options.model_s, options.model_t) == (known, known)


@pytest.mark.parametrize("flag", ["--seeds", "--jobs"])
@pytest.mark.parametrize("text", ["0", "-1", "9" * 30, "1e3", "nan", "", "1025"])
def test_reproduce_has_bounds_too(flag, text, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", f"{flag}={text}"])
    with pytest.raises(UserError, match=flag):
        reproduce.parse_args()


@pytest.mark.parametrize(
    "module", [bench, cka_bias, cost, gpu_campaign, gpu_check, growth, loading, operations, sharing, startup]
)
def test_every_number_of_the_benchmarks_has_bounds_too(module, monkeypatch):
    needed = {cost: ["distillers"], loading: ["--data_dir", "tree"]}.get(module, [])
    numeric, add_argument = {}, Parser.add_argument

    def remember(parser, *names, **settings):
        if settings.get("type") in (int, float):
            numeric[names[0]] = settings["type"]
        return add_argument(parser, *names, **settings)

    monkeypatch.setattr(Parser, "add_argument", remember)
    monkeypatch.setattr(sys, "argv", [module.__name__, *needed])
    assert module.parse_args() and numeric
    for name, kind in numeric.items():
        for text in ("-1", "9" * 30, *(("nan", "inf", "1e30") if kind is float else ())):
            monkeypatch.setattr(sys, "argv", [module.__name__, *needed, f"{name}={text}"])
            with pytest.raises(UserError, match=f"{name} must be "):
                module.parse_args()
