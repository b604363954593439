"""Command lines: the published flags and their pitfalls, our own names, and everything that is refused."""

import itertools
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from common import error_of

import inputs
from dataset.memory import MemoryLoader
from distiller_zoo import CRD, DKD, DPK, distiller_dict
from distiller_zoo.crd import Contrast
from helper.device import device_of, place
from helper.trainer import step_lr
from inputs import UserError, options_of, this_python
from options.flags import StudentOptions, TeacherOptions, as_dict
from options.parse import parse_student, parse_teacher, proportions_in_words, resolve_pair, run_folder
from options.parser import Parser
from temperature import create_temperature, temperature_dict
from temperature.ctkd import CTKDInstance

# The published CIFAR-100 command, flag by flag, spelled as published.
PUBLISHED = (
    "--path-t ./save/models/resnet56_vanilla/ckpt_epoch_240.pth --distill kd --model_s resnet20 -r 0.1 -a 0.9 -b 0"
    " --kd_T 4 --batch_size 64 --learning_rate 0.05 --have_mlp 1 --mlp_name global --t_start 1 --t_end 20"
    " --cosine_decay 1 --decay_max 0 --decay_min -1 --decay_loops 10 --save_model --experiments_dir"
    " tea-res56-stu-res20/KD/global_T/your_experiment_name --experiments_name fold-1"
)

IMAGENET_BETAS = [("pkt", 30000), ("sp", 3000), ("vid", 1), ("crd", 0.8), ("srrl", 1)]


def student(line):
    return parse_student(line.split())


def teacher(line):
    return parse_teacher(line.split())


def test_every_parser_takes_hyphens_for_underscores(monkeypatch):
    parser = Parser("a.py")
    parser.add_argument("--run_dir")
    parser.add_argument("words", nargs="*")
    assert vars(parser.parse_args(["--run-dir", "my-run", "a-b"])) == {"run_dir": "my-run", "words": ["a-b"]}
    assert parser.parse_args(["--run-dir=my-run", "--", "--a-b"]).words == ["--a-b"]
    assert parser.parse_known_intermixed_args(["a", "--run-dir=my-run", "b"])[0].run_dir == "my-run"
    monkeypatch.setattr(sys, "argv", ["benchmarks/a.py", "--run-dir", "x"])
    assert parser.parse_args().run_dir == "x"
    assert error_of(parser.parse_args, ["--other"]).endswith(
        f"({this_python()} benchmarks/a.py --help lists the flags)"
    )


def test_messages_name_the_python_in_use(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "my env/bin/python"))
    assert this_python() == f"'{tmp_path}/my env/bin/python'"
    monkeypatch.chdir(tmp_path)
    assert this_python() == "'my env/bin/python'"
    tmp_path.rmdir()
    assert this_python() == f"'{tmp_path}/my env/bin/python'"


def test_the_published_command_means_what_it_meant():
    options = student(PUBLISHED)
    expected = {
        "path_t": "./save/models/resnet56_vanilla/ckpt_epoch_240.pth",
        "distill": "kd",
        "temperature": "ctkd-global",
        "model_s": "resnet20",
        "gamma": 0.1,
        "alpha": 0.9,
        "beta": 0.0,
        "tau_init": 1.0,
        "tau_range": 20.0,
        "curriculum": "cosine",
        "lambda_min": 0.0,
        "lambda_max": 1.0,
        "lambda_epochs": 10.0,
        "learning_rate": 0.05,
        "lr_decay_epochs": [150, 180, 210],
        "lr_decay_rate": 0.1,
        "weight_decay": 5e-4,
        "momentum": 0.9,
        "batch_size": 64,
        "epochs": 240,
        "dataset": "cifar100",
    }
    assert {key: as_dict(options)[key] for key in expected} == expected
    folder = run_folder(options, "student_model", "-", "-")
    assert folder == Path("save/student_model/tea-res56-stu-res20/KD/global_T/your_experiment_name/fold-1")


def test_clear_names_say_the_same_as_the_published_ones():
    clear = student(
        "--path-t ./save/models/resnet56_vanilla/ckpt_epoch_240.pth --model_s resnet20 --gamma 0.1 --alpha 0.9 --beta 0"
        " --temperature ctkd-global --tau_init 1 --tau_range 20 --curriculum cosine --lambda_min 0 --lambda_max 1"
        " --lambda_epochs 10 --save_model --experiments_dir tea-res56-stu-res20/KD/global_T/your_experiment_name"
        " --experiments_name fold-1"
    )
    assert clear == student(PUBLISHED)


@pytest.mark.parametrize(
    ("published", "temperature"),
    [
        ("", "fixed"),
        ("--have_mlp 0 --mlp_name global", "fixed"),
        ("--have_mlp 1", "ctkd-global"),
        ("--have_mlp 1 --mlp_name instance", "ctkd-instance"),
        ("--have_mlp 1 --mlp_name global --temperature fixed", "fixed"),
        ("--have_mlp 0 --temperature ctkd-instance", "ctkd-instance"),
    ],
)
def test_have_mlp_and_mlp_name_choose_the_temperature(published, temperature):
    assert student(published).temperature == temperature


def test_the_linear_curriculum_by_its_published_flag():
    assert student("--cosine_decay 0").method["curriculum"] == "linear"


def test_leaving_the_curriculum_out_is_the_published_curriculum_and_no_division_by_zero():
    options = student("--have_mlp 1")
    assert (options.method["lambda_min"], options.method["lambda_max"], options.method["lambda_epochs"]) == (0, 1, 10)


def test_every_other_published_flag_is_accepted():
    options = student(
        "--print-freq 200 --num_workers 8 --epochs 240 --gpu_id 0 --lr_decay_epochs 150,180,210 --lr_decay_rate 0.1"
        " --weight_decay 5e-4 --momentum 0.9 --dataset cifar100 --trial 1 --feat_dim 128 --mode exact --nce_k 16384"
        " --nce_t 0.07 --nce_m 0.5 --hint_layer 2 --dkd_alpha 1 --dkd_beta 2 --dali gpu --deterministic"
        " --dist-url tcp://127.0.0.1:23451 --skip-validation"
    )
    assert options.print_freq == 200
    assert options.skip_validation
    options = teacher("--model vgg13 --save_freq 40 --print_freq 100 --batch_size 64 --learning_rate 0.05 --trial 0")
    assert (options.model, options.save_freq) == ("vgg13", 40)


@pytest.mark.parametrize(
    ("flags", "weights"),
    [
        ("--distill pkt -r 0.1 -a 0.9 -b 30000", (0.1, 0.9, 30000)),
        ("--distill sp -r 0.1 -a 0.9 -b 3000", (0.1, 0.9, 3000)),
        ("--distill vid -r 0.1 -a 0.9 -b 1", (0.1, 0.9, 1)),
        ("--distill crd -r 0.1 -a 0.9 -b 0.8", (0.1, 0.9, 0.8)),
        ("--distill attention -r 0.1 -a 0.9 -b 1000", (0.1, 0.9, 1000)),
        ("--distill rkd -r 0.1 -a 0.9 -b 1", (0.1, 0.9, 1)),
        ("--distill hint -r 0.1 -a 0.9 -b 100", (0.1, 0.9, 100)),
        ("--distill nst -r 0.1 -a 0.9 -b 50", (0.1, 0.9, 50)),
        ("--distill correlation -r 0.1 -a 0.9 -b 0.02", (0.1, 0.9, 0.02)),
        ("--distill factor -r 0.1 -a 0.9 -b 200", (0.1, 0.9, 200)),
        ("--distill fsp -r 0.1 -a 0.9 -b 50", (0.1, 0.9, 0)),
        ("--distill dist -r 1 -a 0 -b 2", (1, 0, 2)),
        ("--distill rld -r 1 -a 0 -b 1", (1, 0, 1)),
        ("--distill nkd -r 1 -a 0 -b 1", (1, 0, 1)),
        ("--distill wsld -r 1 -a 0 -b 2.25", (1, 0, 2.25)),
        ("--distill srrl -r 0.1 -a 0.9 -b 1", (0.1, 0.9, 1)),
        ("--distill dkd -r 1 -a 0 -b 1 --dkd_alpha 1 --dkd_beta 2", (1, 0, 1)),
        *((f"--distill {name} -r 1 -a 1 -b {beta}", (1, 1, beta)) for name, beta in IMAGENET_BETAS),
        ("--distill dkd -r 1 -a 0 -b 1 --dkd_alpha 1 --dkd_beta 1", (1, 0, 1)),
        ("--distill pkt -r 1 -a 0 -b 30000 --have_mlp 0", (1, 0, 30000)),  # RepDistiller's: only the method's loss
    ],
)
def test_the_published_command_of_every_distiller(flags, weights):
    options = student(f"{PUBLISHED} {flags}")
    assert (options.gamma, options.alpha, options.beta) == weights
    if "-r 0.1" in flags or "--dkd_beta 2" in flags:  # CIFAR-100's published weights are the default
        short = student(PUBLISHED.replace("-r 0.1 -a 0.9 -b 0", "") + f" --distill {options.distill}")
        assert resolve_pair(short, "resnet56") == resolve_pair(options, "resnet56")


def test_the_weights_of_dkd_follow_their_source():
    def resolved(flags, teacher):
        options = resolve_pair(student("--distill dkd " + flags), teacher)
        return options.method["dkd_beta"], options.method["dkd_warmup"]

    assert resolved("--model_s vgg8", "vgg13") == (2, 0)
    assert resolved("--model_s vgg8 --dkd_weights mdistiller", "vgg13") == (6, 20)
    assert resolved("--model_s ShuffleV2 --dkd_weights mdistiller", "resnet32x4") == (8, 20)
    assert resolved("--model_s vgg8 --dkd_weights mdistiller --epochs 60", "vgg13") == (6, 5)
    assert resolved("--model_s resnet20 --dkd_weights mdistiller --dkd_warmup 5", "resnet56") == (2, 5)
    assert resolved("--model_s resnet8 --dkd_weights mdistiller --dkd_beta 3", "resnet56") == (3, 20)
    with pytest.raises(UserError, match="no weight for resnet56 → resnet8: leave --dkd_weights out.*of resnet56"):
        resolved("--model_s resnet8 --dkd_weights mdistiller", "resnet56")


@pytest.mark.parametrize(
    ("teacher", "model", "weights"),
    [
        ("resnet56", "resnet20", (1, 0.5)), ("resnet110", "resnet32", (1, 0.5)), ("wrn_40_2", "wrn_40_1", (1, 0.5)),
        ("wrn_40_2", "wrn_16_2", (3, 1)), ("resnet32x4", "resnet8x4", (3, 1)), ("vgg13", "vgg8", (3, 1)),
        ("resnet32x4", "ShuffleV1", (3, 1)), ("resnet32x4", "ShuffleV2", (3, 1)), ("wrn_40_2", "ShuffleV1", (2, 0.5)),
        ("ResNet50", "MobileNetV2", (3, 2)), ("vgg13", "MobileNetV2", (3, 1)), ("resnet14", "resnet8", (3, 1)),
    ],
)  # fmt: skip
def test_dtkd_has_the_published_weights_of_the_pair(teacher, model, weights):
    options = resolve_pair(student(f"--temperature dtkd --model_s {model}"), teacher)
    assert (options.gamma, options.beta, options.kd_warmup, options.kd_T) == (1, 0, 20, 4)
    assert (options.alpha, options.fixed_alpha) == weights


def test_the_weights_of_a_temperature_are_those_of_kd_only_and_can_be_given():
    def resolved(line):
        options = resolve_pair(student(line), "resnet56")
        return tuple(getattr(options, key) for key in ("gamma", "alpha", "fixed_alpha", "beta", "kd_warmup"))

    assert resolved("") == (0.1, 0.9, 0, 0, 0)
    assert resolved("--temperature dtkd -r 0.1 -a 0.9 --fixed_alpha 0 --kd_warmup 0") == (0.1, 0.9, 0, 0, 0)
    assert resolved("--temperature dtkd -a 2 --epochs 60") == (1, 2, 1, 0, 5)
    assert resolved("--temperature dtkd --distill sp") == (0.1, 0.9, 0, 3000, 0)
    assert resolved("--temperature dtkd --distill dkd") == (1, 0, 0, 1, 0)
    assert resolved("--temperature standardised") == (0.1, 9, 0, 0, 0)
    assert resolved("--temperature standardised --distill dkd") == (1, 0, 0, 1, 0)
    assert resolved("--temperature ctkd-global --logit_stand -a 9") == (0.1, 9, 0, 0, 0)
    assert resolved("--temperature rlkd --fixed_alpha 0.5 --kd_warmup 3") == (0.1, 0.9, 0.5, 0, 3)


def test_a_warm_up_of_nothing_is_refused():
    with pytest.raises(UserError, match="--kd_warmup 20 has no KD term to act on: leave it out, --dkd_warmup is DKD's"):
        resolve_pair(student("--distill dkd --kd_warmup 20"), "resnet56")


def test_a_share_is_the_same_however_it_is_written():
    for text in ("fixed:.5", "fixed:0.50", "fixed:5e-1"):
        assert parse_student(["--dpk_schedule", text]).method["dpk_schedule"] == "fixed:0.5"


def test_the_phases_of_rlkd_follow_the_length_of_the_schedule():
    def phases(line):
        options = student("--temperature rlkd " + line)
        return options.method["rl_warmup"], options.method["rl_epoch"], options.method["aug_epoch"]

    assert phases("") == (20, 20, 20)
    assert phases("--epochs 60") == (5, 5, 5)
    assert phases("--epochs 5") == (1, 1, 1)
    assert phases("--rl_warmup 7 --rl_epoch 3 --aug_epoch 0") == (7, 3, 0)


@pytest.mark.parametrize("model", ["MobileNetV2", "ShuffleV1", "ShuffleV2"])
def test_light_networks_get_their_published_rate_and_it_is_said(model, capsys):
    """Row 11 of RLKD's bugs: its ShuffleNets learn at 0.05."""
    assert student(f"--model_s {model}").learning_rate == 0.01
    assert capsys.readouterr().out == ""
    assert student(f"--model_s {model} --learning_rate 0.05").learning_rate == 0.01
    assert "learning rate 0.01 instead of 0.05" in capsys.readouterr().out
    assert student(f"--model_s {model} --learning_rate 0.02 --lr 0.05").learning_rate == 0.05
    assert capsys.readouterr().out == ""
    assert teacher(f"--model {model}").learning_rate == 0.01


def test_decays_follow_the_length_of_the_schedule():
    assert teacher("--epochs 40").lr_decay_epochs == [25, 30, 35]
    assert teacher("--epochs 40 --lr_decay_epochs 10,20").lr_decay_epochs == [10, 20]


def test_milestones_that_coincide_are_one():
    for epochs in range(1, 300):
        milestones = teacher(f"--epochs {epochs}").lr_decay_epochs
        assert milestones == sorted(set(milestones)) and milestones[-1] <= epochs
        rates = [step_lr(0.1, epoch, milestones, 0.1) for epoch in range(1, epochs + 1)]
        assert all(later > 0.09 * earlier for earlier, later in itertools.pairwise(rates))
    assert teacher("--epochs 3").lr_decay_epochs == [2, 3]
    assert teacher("--epochs 240").lr_decay_epochs == [150, 180, 210]
    assert teacher("--epochs 3 --lr_decay_epochs 99999999").lr_decay_epochs == [99999999]  # no drop at all


def test_milestones_that_are_given_are_kept_as_they_are(capsys):
    """Also those of a run from before milestones were merged, which so goes on."""
    assert teacher("--epochs 3 --lr_decay_epochs 2,2,3").lr_decay_epochs == [2, 2, 3]
    assert "--lr_decay_epochs names epoch 2 more than once, so the rate drops as often there" in capsys.readouterr().out
    assert teacher("--lr_decay_epochs 180,150").lr_decay_epochs == [180, 150]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--epochs 3 --temperature ctkd-global", "3 epochs instead of 240; in proportion: the learning rate's drops,"
         " after 2 and 3 (--lr_decay_epochs); not: lambda's rise over 10 epochs, here to 0.21 (--lambda_epochs)"),
        ("--epochs 40 --temperature dtkd", "40 epochs instead of 240; in proportion: the learning rate's drops, after"
         " 25, 30 and 35 (--lr_decay_epochs); KD's warm-up over 3 epochs (--kd_warmup)"),
        ("--epochs 5 --temperature dtkd --lr_decay_epochs 3", "5 epochs instead of 240; in proportion: KD's warm-up, of"
         " which nothing is left (--kd_warmup)"),
        ("--epochs 40 --temperature dtkd --lr_decay_epochs 3 --kd_warmup 0", None),
        ("--epochs 60 --temperature rlkd --lr_decay_epochs 3", "60 epochs instead of 240; in proportion: the phases'"
         " lengths in epochs, 5 (--rl_warmup, --aug_epoch, --rl_epoch)"),
        ("--epochs 60 --distill dkd --dkd_weights mdistiller --model_s resnet20 --lr_decay_epochs 3", "60 epochs"
         " instead of 240; in proportion: DKD's warm-up over 5 epochs (--dkd_warmup)"),
        ("--epochs 5 --kd_warmup 20 --lr_decay_epochs 3", "5 epochs instead of 240; not: KD's warm-up over 20 epochs,"
         " which reaches 25% of the weight (--kd_warmup)"),
        ("--epochs 120 --lr_decay_epochs 30,60,90", None),
        ("--temperature ctkd-instance", None),
    ],
)  # fmt: skip
def test_what_a_short_run_scales_is_said_with_the_flags(line, says):
    assert proportions_in_words(resolve_pair(student(line), "resnet56")) == says


def test_what_a_short_run_of_a_teacher_scales_is_said():
    told = "1 epoch instead of 240; in proportion: the learning rate's drops, after 1 (--lr_decay_epochs)"
    assert proportions_in_words(teacher("--epochs 1")) == told


@pytest.mark.parametrize(
    ("published", "ours"),
    [
        ("--distill similarity", "--distill sp"), ("--distill SP", "--distill sp"), ("--distill KD", "--distill kd"),
        ("--distill DKD", "--distill dkd"), ("--distill PKT", "--distill pkt"), ("--distill VID", "--distill vid"),
        ("--distill CRD", "--distill crd"), ("--distill attention", "--distill at"), ("--distill AT", "--distill at"),
        ("--distill correlation", "--distill cc"), ("--distill FITNET", "--distill hint"),
        ("--distill RKD", "--distill rkd"), ("--distill NST", "--distill nst"),
        ("--distill REVIEWKD", "--distill reviewkd"), ("--distill OFD", "--distill ofd"),
        ("--distill factor", "--distill ft"), ("--distill FSP", "--distill fsp"),
        ("--model_s MOBILENETV2", "--model_s MobileNetV2"),
        ("--dataset imagenet --model_s MobileNetV1", "--dataset imagenet --model_s MobileNetV1_Imagenet"),
    ],
)  # fmt: skip
def test_names_of_the_original_codes_are_taken(published, ours):
    assert student(published) == student(ours)


def test_reviewkds_weight_is_that_of_the_pair():
    def beta(flags, teacher):
        return resolve_pair(student("--distill reviewkd " + flags), teacher).beta

    assert beta("--model_s resnet20", "resnet56") == 0.6
    assert beta("--model_s ShuffleV2", "resnet32x4") == 8
    assert beta("--model_s vgg8", "vgg13") == 1  # not published
    assert beta("--model_s resnet20 -b 3", "resnet56") == 3
    assert student("--distill reviewkd --epochs 24").method["reviewkd_warmup"] == 2


def test_dtkd_is_a_temperature():
    with pytest.raises(UserError, match="--distill DTKD is a temperature here: give --temperature dtkd instead"):
        student("--distill DTKD")


def test_the_weight_that_repdistillers_commands_leave_out_is_said(capsys):
    command = "--path_t ./save/models/resnet32x4_vanilla/ckpt_epoch_240.pth --model_s resnet8x4 --trial 1"
    assert student(f"{command} --distill similarity -a 0 -b 3000").gamma == 0.1
    assert "RepDistiller's commands leave -r out and mean -r 1" in capsys.readouterr().out
    student(f"{command} --distill kd -r 0.1 -a 0.9 -b 0")
    student(f"{command} --distill similarity -r 1 -a 0 -b 3000")
    assert capsys.readouterr().out == ""


NINES = "9" * 30


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (f"--trials {NINES} --dry_run", f"--trials must be 1,000 or less, not {NINES}"),
        ("--trials 1000 --model_s vgg19", "1000 networks, trained side by side, would take .* a smaller --trials"),
        ("--seed 9223372036854775807 --trials 2", "the seeds of --trials must be below 2\\^63 as well"),
        ("--temperature ctkd-instance --instance_width 1000000000", "--instance_width must be 65,536 or less"),
        ("--distill crd --nce_k 10000000000", "--nce_k must be 1,000,000,000 or less"),
        ("--distill crd --nce_k 100000000", "CRD's negatives of a batch would take 238.4 GiB, .* --nce_k or"),
        ("--distill crd --feat_dim 100000", "--feat_dim must be 65,536 or less"),
        ("--distill dpk --dpk_width 100000", "--dpk_width must be 65,536 or less"),
        ("--distill dpk --dpk_decoder_depth 100000", "--dpk_decoder_depth must be 1,000 or less"),
        ("--image_size 8000 --batch_size 100000", "a batch of 100000 images would take .* --batch_size or"),
        (f"--fixed_alpha 1 --kd_warmup {NINES}", "--kd_warmup must be 100,000 or less"),
        ("--kd_warmup 24001", "--kd_warmup 24001 is more than a hundred times --epochs 240"),
        ("--distill rld --rld_warmup 501 --epochs 5", "--rld_warmup 501 is more than a hundred times --epochs 5"),
        ("--distill reviewkd --reviewkd_warmup 501 --epochs 5", "--reviewkd_warmup 501 is more than a hundred times"),
        ("--distill reviewkd -b 0", "--beta 0 leaves nothing of --distill reviewkd"),
        ("--distill dkd --dkd_warmup 501 --epochs 5", "--dkd_warmup 501 is more than a hundred times --epochs 5"),
        ("--have_mlp 1 --decay_loops 5e6", "--lambda_epochs 5e\\+06 is more than a hundred times --epochs 240"),
        ("--alpha 1e-320", "--alpha must be 0, or 1e-06 or more, not 1e-320"),
        ("--beta 1e30 --distill sp", "--beta must be 1,000,000,000 or less, not 1e\\+30"),
        ("--momentum 1e30", "--momentum must be 0.9999 or less"),
        ("--lr_decay_rate 1e30", "--lr_decay_rate must be 1 or less"),
        ("--lr_decay_rate 0", "--lr_decay_rate must be above 0"),
        ("--lr_decay_epochs 1,-5", "--lr_decay_epochs must be 0 or more, not -5"),
        (f"--lr_decay_epochs {NINES}", "--lr_decay_epochs must be 1,000,000,000 or less"),
        ("--hint_layer -1", "--hint_layer must be 0 or more"),
        ("--hint_layer 5", "--hint_layer must be 4 or less"),
        ("--distill at --at_form strange", "unknown --at_form 'strange'; the known ones are: mean, paper"),
        ("--distill cc --cc_kernel strange", "unknown --cc_kernel 'strange'; the known ones are: neighbours"),
        ("--lr 1e-320", "--lr must be 1e-09 or more, not 1e-320"),
        ("--kd_T 1e-320", "--kd_T must be 0.01 or more, not 1e-320"),
        ("--kd_T 1e30", "--kd_T must be 1,000 or less"),
        ("--base_tau 1e30", "--base_tau must be 1,000 or less"),
        ("--rl_tau_min 1e-30", "--rl_tau_min must be 0.01 or more"),
        ("--decay_max nan", "--lambda_min must be 0 or more, not nan"),
        ("--random_mean inf", "--random_mean must be 100 or less, not inf"),
        ("--dist_timeout 1e30", "--dist_timeout must be 10,000,000 or less"),
        ("--num_workers 1000", "--num_workers must be 512 or less"),
        ("--distill dpk --dpk_schedule fixed:0.99999999", "would learn nothing from DPK: give a share below 1$"),
        ("--distill dpk --dpk_schedule fixed:0.9999", "one patch of 10,000 to learn from: give a share of 0.99"),
        ("--distill dpk --dpk_schedule fixed:nan", "a share from 0 to 1 like fixed:0.5; not fixed:nan"),
        ("--beta=--", "--beta needs a value, and -- is not one"),
    ],
)
def test_numbers_have_two_bounds_and_sizes_fit_into_memory(line, says, monkeypatch):
    monkeypatch.setattr(inputs, "host_memory", lambda: 2**34)
    with pytest.raises(UserError, match=says) as error:
        student(line)
    assert "\n" not in str(error.value)


def test_what_does_not_fit_is_refused_before_it_is_allocated(monkeypatch):
    monkeypatch.setattr(inputs, "host_memory", lambda: 10**6)
    meta = torch.device("meta")
    for make, says in (
        (lambda: CTKDInstance(100, 5000), "--instance_width 5000 for 100 classes would take 12.1 MB.*a smaller"),
        (lambda: Contrast(10**12, 128), "CRD's two memory banks.*would take 953,674.3 GiB.*smaller --feat_dim$"),
        (lambda: DPK([16] * 5, [16] * 5, epochs=1, dpk_width=60_000), "encoders and decoders would take.*--dpk_width"),
        (lambda: DPK([16] * 5, [16] * 5, epochs=1, dpk_decoder_depth=100), "--dpk_decoder_depth$"),
    ):
        with pytest.raises(UserError, match=says), meta:
            make()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--batch_size 200", "a batch of 200 images would take 2.5 MB, and the GPU has 2.1 MB: .* --batch_size or"),
        ("--distill crd --nce_k 1000 --batch_size 64", "CRD's negatives of a batch would take 2.6 MB, and the GPU has"),
        ("--trials 3", "3 networks, trained side by side, would take .* and the GPU has 2.1 MB: .* --trials$"),
    ],
)
def test_sizes_fit_into_the_gpu_that_the_run_uses(line, says, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    memories = {0: 2**40, 1: 2**21}
    properties = lambda gpu: SimpleNamespace(total_memory=memories[gpu.index])  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    options = student(f"--model_s resnet8 --path-t x.pth {line}")
    with device_of(replace(options, device="cuda:0")) as device:
        assert device == torch.device("cuda:0")
    with pytest.raises(UserError, match=says), device_of(replace(options, device="cuda:1")):
        pass


def test_networks_and_images_fit_into_the_gpu_that_they_are_moved_to(monkeypatch):
    gpu = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=10**6))
    frozen = torch.nn.Linear(500, 500).requires_grad_(False)  # 1 MB, or 3 MB when trained
    for module, size in ((frozen, "1.0 MB"), (torch.nn.Linear(300, 300), "1.1 MB")):
        with pytest.raises(UserError, match=f"would take {size}, and the GPU has 1.0 MB: choose a smaller network"):
            place(module, gpu)
    settings = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "batch_size": 1, "target": torch.zeros(300), "augment": True}
    with pytest.raises(UserError, match="300 images would take 1.4 MB, and the GPU has 1.0 MB: .* --train_subset or"):
        MemoryLoader(images=torch.zeros(300, 3, 32, 32, dtype=torch.uint8), device=gpu, **settings)


TRAINING = {"epochs": 10, "train_target": torch.zeros(4), "rl_warmup": 1, "rl_epoch": 1}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: create_temperature("ctkd-global", tau_range=1e30), "--tau_range must be 1,000 or less"),
        (lambda: create_temperature("rlkd", rl_rollout=1, **TRAINING), "--rl_rollout must be 2 or more"),
        (lambda: create_temperature("rlkd", rl_max_kl=-1.0, **TRAINING), "--rl_max_kl must be 0 or more"),
        (lambda: DKD(10, dkd_beta=-1.0), "--dkd_beta must be 0 or more"),
        (lambda: CRD([4], [4], torch.arange(2), nce_m=1.0), "--nce_m must be below 1"),
        (lambda: CRD([4], [4], torch.arange(2), nce_t=0.0), "--nce_t must be above 0"),
        (lambda: DPK([4] * 5, [4] * 5, epochs=1, dpk_stages=-1), "--dpk_stages must be 0 or more"),
        (lambda: DPK([4] * 5, [4] * 5, epochs=1, dpk_momentum=1.5), "--dpk_momentum must be below 1"),
    ],
)
def test_temperatures_and_distillers_refuse_the_numbers_that_the_command_line_refuses(make, says):
    with pytest.raises(UserError, match=says):
        make()


def test_an_option_is_the_same_wherever_it_is_taken():
    takers = (*distiller_dict.values(), *temperature_dict.values(), TeacherOptions, StudentOptions)
    seen = {}
    for taker in takers:
        for name, declared in options_of(taker).items():
            first = seen.setdefault(name, declared)
            assert declared[:3] == first[:3], f"{name} of {declared.owner} is another than that of {first.owner}"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--model_s resnet21", "unknown model 'resnet21'.*resnet20.*ShuffleV2"),
        ("--model_t resnet21", "unknown model 'resnet21'.*resnet20"),
        ("--distill kdd", "unknown distiller 'kdd'.*kd"),
        ("--temperature warm", "unknown temperature 'warm'.*fixed, ctkd-global, ctkd-instance"),
        ("--dataset coco", "the data set coco is for detectors .train_detector.py.: give one of cifar10,"),
        ("--dataset mnist", "unknown data set 'mnist'.*cifar100"),
        ("--dist_timeout 0", "--dist_timeout must be above 0"),
        ("--batch_size 0", "--batch_size must be 1 or more, not 0"),
        ("--epochs -5", "--epochs must be 1 or more, not -5"),
        ("--kd_T 0", "--kd_T must be above 0"),
        ("--kd_T -4", "--kd_T must be above 0"),
        ("--kd_T nan", "--kd_T must be above 0"),
        ("--learning_rate inf", "--learning_rate must be 100 or less, not inf"),
        ("--lr 0", "--lr must be above 0"),
        ("--learning_rate 0", "--learning_rate must be above 0"),
        ("--seed 9223372036854775808", "--seed must be below 2"),
        ("--alpha 0", "--alpha and --beta are both 0, so nothing would be distilled"),
        ("--distill kd -b 1", "--beta 1 does nothing in --distill kd: give -b 0"),
        ("--distill pkt -b 0", "--beta 0 leaves nothing of --distill pkt: leave -b out for 30000"),
        ("--distill sp -a 0 --have_mlp 1", "--alpha 0 leaves --temperature ctkd-global nothing to act on"),
        ("--temperature dtkd -a 0 --fixed_alpha 1", "--alpha 0 leaves --temperature dtkd nothing to act on"),
        ("--distill cat_kd -a 0 --logit_stand", "--alpha 0 leaves --logit_stand nothing to act on"),
        ("--distill sdd --sdd_loss dkd --sdd_alpha 0 --sdd_beta 0", "--sdd_alpha and --sdd_beta are both 0"),
        ("--temperature standardised --logit_stand", "is on z-scored logits already: leave --logit_stand out"),
        ("--temperature rlkd --epochs 5 --rl_warmup 6", "--rl_warmup must be from 1 to --epochs 5, not 6"),
        ("--temperature rlkd --epochs 5 --rl_epoch 6", "--rl_epoch 6 divides no epoch from --rl_warmup 1"),
        ("--temperature dtkd -a 0", "--alpha 0 leaves --temperature dtkd nothing to act on"),
        ("--fixed_alpha -1", "--fixed_alpha must be 0 or more"),
        ("--kd_warmup -1", "--kd_warmup must be 0 or more"),
        ("--temperature rlkd --rl_warmup 0", "--rl_warmup must be 1 or more"),
        ("--temperature rlkd --rl_epoch 0", "--rl_epoch must be 1 or more"),
        ("--temperature rlkd --aug_epoch -1", "--aug_epoch must be 0 or more"),
        ("--temperature rlkd --rl_rollout 1", "--rl_rollout must be 2 or more"),
        ("--temperature rlkd --rl_tau_max 1", "--rl_tau_max must be above --rl_tau_min, not 1.0 and 1.0"),
        ("--temperature random --random_std -1", "--random_std must be 0 or more, not -1.0"),
        ("--temperature annealing --anneal_to 0", "--anneal_to must be above 0"),
        ("--temperature annealing --anneal_shape steps", "unknown --anneal_shape 'steps'.*linear, cosine"),
        ("--temperature standardised --base_tau 0", "--base_tau must be above 0"),
        ("--distill crd --mode loose", "unknown --mode 'loose'; the known ones are: exact, relax"),
        ("--distill crd --nce_k 0", "--nce_k must be 1 or more, not 0"),
        ("--distill crd --nce_t 0", "--nce_t must be above 0"),
        ("--distill crd --nce_m 1", "--nce_m must be below 1, not 1.0"),
        ("--distill crd --feat_dim 0", "--feat_dim must be 1 or more"),
        ("--distill dpk --dpk_schedule fixed:2", "a share from 0 to 1 like fixed:0.5; not fixed:2"),
        ("--distill dpk --dpk_schedule fixed:1", "would learn nothing from DPK: give a share below 1$"),
        ("--distill dpk --dpk_schedule linear --epochs 1", "a share below 1, or more --epochs than 1"),
        ("--distill dpk --train_subset 3", "takes a --train_subset of 4 or more, not 3"),
        ("--distill dpk --batch_size 3", "takes a --batch_size of 4 or more, not 3"),
        ("--distill dpk --dpk_patch 33", "--dpk_patch 33 is larger than the images, which have a side of 32"),
        ("--distill dpk --dpk_mask image", "unknown --dpk_mask 'image'; the known ones are: sample, batch"),
        ("--distill dpk --dpk_stages -1", "--dpk_stages must be 0 or more"),
        ("--distill dpk --dpk_patch 0", "--dpk_patch must be 1 or more"),
        ("--distill dpk --dpk_width 0", "--dpk_width must be 1 or more"),
        ("--distill dpk --dpk_encoder_depth -1", "--dpk_encoder_depth must be 0 or more"),
        ("--distill dpk --dpk_decoder_depth -1", "--dpk_decoder_depth must be 0 or more"),
        ("--distill dpk --dpk_momentum 1", "--dpk_momentum must be below 1, not 1.0"),
        ("--distill dkd --dkd_beta -1", "--dkd_beta must be 0 or more"),
        ("--distill dkd --dkd_warmup -1", "--dkd_warmup must be 0 or more"),
        ("--distill dkd --dkd_alpha 0 --dkd_beta 0", "--dkd_alpha and --dkd_beta are both 0"),
        ("--distill pkt --dkd_weights mdistiller", "--dkd_weights belongs to --distill dkd"),
        ("--distill dkd --dkd_weights mine", "unknown --dkd_weights 'mine'"),
        ("--temperature ctkd-global --tau_range -1", "--tau_range must be above 0"),
        ("--temperature ctkd-global --curriculum spiral", "unknown --curriculum 'spiral'"),
        ("--have_mlp 1 --lambda_epochs 0", "--lambda_epochs must be above 0"),
        ("--alpha nan", "--alpha must be 0 or more"),
        ("-b -1", "--beta must be 0 or more"),
        ("--lr_decay_epochs a,b", "--lr_decay_epochs: give whole numbers separated by commas"),
        ("--model-s resnet20 --nonsense 1", "unrecognized arguments: --nonsense"),
        ("--tempe fixed", "unrecognized arguments: --tempe"),
        ("--epochs many", "--epochs: invalid int value: 'many'"),
        ("--cosine_decay 2", "--cosine_decay"),
        ("--mlp_name local", "invalid choice: 'local'"),
    ],
)
def test_wrong_use_is_one_sentence(line, says):
    with pytest.raises(UserError, match=says) as error:
        student(line)
    assert "\n" not in str(error.value)
    assert error.value.status == 2


@pytest.mark.parametrize(
    ("line", "teacher", "message"),
    [("fsp --model_s resnet8x4", "resnet56", "needs two networks with the same widths"),
     ("ofd --model_s resnet8", "ShuffleV1", "needs a batch norm before the ReLU of each of the teacher's stages"),
     ("ofd --model_s resnet8", "timm:resnet10t", "the network timm:resnet10t gives no maps before the ReLU")],
)  # fmt: skip
def test_a_pair_is_refused_before_its_teacher_is_trained(line, teacher, message):
    assert message in error_of(resolve_pair, parse_student(f"--distill {line}".split()), teacher)


def test_widths_of_a_network_of_another_library_are_compared_when_it_is_built():
    assert resolve_pair(parse_student(["--distill", "fsp", "--model_s", "resnet8x4"]), "timm:resnet10t")
