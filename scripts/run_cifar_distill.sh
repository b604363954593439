#!/bin/sh
# CIFAR-100: resnet56 -> resnet20 with CTKD's global temperature, with the published flags.
# Published: resnet20 alone 69.06, KD 70.66, CTKD 71.19 (top-1; last or best epoch is not stated).
# Data: --data_dir DIR or CIFAR100_DIR=DIR, the folder that holds cifar-100-python/.
# Teacher: sh scripts/run_cifar_vanilla.sh trains it; --train_teacher trains a missing one first.
# Loss weights: by default each method's published ones, listed below (DPK's and SKD's are ours); -r, -a and -b change
# them. AT, RKD, FitNet, NST, CC and FT have RepDistiller's -b, ReviewKD and OFD their authors', of runs with -r 1 -a 0.
# Later flags win, so these give the other rows. With CTKD's global temperature:
#   PKT    --distill pkt --experiments_name pkt+ctkd      -r 0.1 -a 0.9 -b 30000
#   SP     --distill sp --experiments_name sp+ctkd        -r 0.1 -a 0.9 -b 3000
#   VID    --distill vid --experiments_name vid+ctkd      -r 0.1 -a 0.9 -b 1
#   CRD    --distill crd --experiments_name crd+ctkd      -r 0.1 -a 0.9 -b 0.8
#   SRRL   --distill srrl --experiments_name srrl+ctkd    -r 0.1 -a 0.9 -b 1
#   DKD    --distill dkd --experiments_name dkd+ctkd      -r 1 -a 0 -b 1 --dkd_alpha 1 --dkd_beta 2
#   DPK    --distill dpk --experiments_name dpk+ctkd      -r 0.1 -a 0.9 -b 10
#   AT     --distill at --experiments_name at+ctkd        -r 0.1 -a 0.9 -b 1000
#   RKD    --distill rkd --experiments_name rkd+ctkd      -r 0.1 -a 0.9 -b 1 --rkd_distance 25 --rkd_angle 50
#   FitNet  --distill hint --experiments_name hint+ctkd   -r 0.1 -a 0.9 -b 100 --hint_layer 2
#   NST    --distill nst --experiments_name nst+ctkd      -r 0.1 -a 0.9 -b 50
#   CC     --distill cc --experiments_name cc+ctkd        -r 0.1 -a 0.9 -b 0.02
#   DIST   --distill dist --experiments_name dist+ctkd    -r 1 -a 0 -b 2 --dist_beta 1 --dist_gamma 1
#   RLD    --distill rld --experiments_name rld+ctkd      -r 1 -a 0 -b 1 --rld_alpha 1 --rld_beta 8 --rld_tau 1 --rld_warmup 20
#   NKD    --distill nkd --experiments_name nkd+ctkd      -r 1 -a 0 -b 1 --nkd_gamma 1.5
#   WSLD   --distill wsld --experiments_name wsld+ctkd    -r 1 -a 0 -b 2.25
#   ICKD   --distill ickd --experiments_name ickd+ctkd    -r 0.1 -a 0.9 -b 2.5
#   SRD    --distill srd --experiments_name srd+ctkd      -r 0.1 -a 0.9 -b 2 --srd_exponent 4
#   MLKD   --distill mlkd --experiments_name mlkd+ctkd    -r 0.1 -a 0 -b 0.9
#   KDSVD  --distill kdsvd --experiments_name kdsvd+ctkd  -r 0.1 -a 0.9 -b 1
#   CSKD   --distill cskd --experiments_name cskd+ctkd    -r 0.1 -a 0.9 -b 0.9
#   ReviewKD  --distill reviewkd --experiments_name reviewkd+ctkd    -r 0.1 -a 0.9 -b 0.6 --reviewkd_warmup 20
#   OFD    --distill ofd --experiments_name ofd+ctkd      -r 0.1 -a 0.9 -b 0.001
#   SimKD  --distill simkd --experiments_name simkd+ctkd  -r 0 -a 0.9 -b 1 --simkd_factor 2
#   CAT-KD  --distill cat_kd --experiments_name cat_kd+ctkd  -r 1 -a 0.9 -b 0.7 --cat_resolution 2 --cat_normalise no
#   SDD    --distill sdd --experiments_name sdd+ctkd      -r 0.1 -a 0 -b 0.9 --sdd_loss kd --sdd_scales 1,2 --sdd_warmup 20
#   SKD    --distill skd --experiments_name skd+ctkd      -r 0.1 -a 0.9 -b 1
#   ITRD   --distill itrd --experiments_name itrd+ctkd    -r 0.1 -a 0.9 -b 1 --itrd_correlation 2 --itrd_mutual 1
#   SWAP   --distill swap --experiments_name swap+ctkd    -r 0.1 -a 0 -b 0.9
#   FT     --distill ft --experiments_name ft+ctkd        -r 0.1 -a 0.9 -b 200 --init_epochs 30
#   AB     --distill ab --experiments_name ab+ctkd        -r 0.1 -a 0.9 --init_epochs 30
#   FSP    --distill fsp --experiments_name fsp+ctkd      -r 0.1 -a 0.9 --init_epochs 30
# With a fixed temperature of 4:
#   KD     --have_mlp 0 --experiments_name kd
#   PKT    --have_mlp 0 --distill pkt --experiments_name pkt
#   SP     --have_mlp 0 --distill sp --experiments_name sp
#   VID    --have_mlp 0 --distill vid --experiments_name vid
#   CRD    --have_mlp 0 --distill crd --experiments_name crd
#   SRRL   --have_mlp 0 --distill srrl --experiments_name srrl
#   DKD    --have_mlp 0 --distill dkd --experiments_name dkd
#   DPK    --have_mlp 0 --distill dpk --experiments_name dpk
#   AT     --have_mlp 0 --distill at --experiments_name at
#   RKD    --have_mlp 0 --distill rkd --experiments_name rkd
#   FitNet  --have_mlp 0 --distill hint --experiments_name hint
#   NST    --have_mlp 0 --distill nst --experiments_name nst
#   CC     --have_mlp 0 --distill cc --experiments_name cc
#   DIST   --have_mlp 0 --distill dist --experiments_name dist
#   RLD    --have_mlp 0 --distill rld --experiments_name rld
#   NKD    --have_mlp 0 --distill nkd --experiments_name nkd
#   WSLD   --have_mlp 0 --distill wsld --experiments_name wsld
#   ICKD   --have_mlp 0 --distill ickd --experiments_name ickd
#   SRD    --have_mlp 0 --distill srd --experiments_name srd
#   KDSVD  --have_mlp 0 --distill kdsvd --experiments_name kdsvd
#   MLKD   --have_mlp 0 --distill mlkd --experiments_name mlkd
#   CSKD   --have_mlp 0 --distill cskd --experiments_name cskd
#   ReviewKD  --have_mlp 0 --distill reviewkd --experiments_name reviewkd
#   OFD    --have_mlp 0 --distill ofd --experiments_name ofd
#   SimKD  --have_mlp 0 --distill simkd --experiments_name simkd
#   CAT-KD  --have_mlp 0 --distill cat_kd --experiments_name cat_kd
#   CAT-KD without a bias       --have_mlp 0 --distill cat_kd --cat_without_bias --experiments_name cat_kd-bias
#   SDD    --have_mlp 0 --distill sdd --experiments_name sdd
#   SDD of DKD                  --have_mlp 0 --distill sdd --sdd_loss dkd --experiments_name sdd-dkd
#   SKD    --have_mlp 0 --distill skd --experiments_name skd
#   ITRD   --have_mlp 0 --distill itrd --experiments_name itrd
#   SWAP   --have_mlp 0 --distill swap --experiments_name swap
#   FT     --have_mlp 0 --distill ft --experiments_name ft
#   AB     --have_mlp 0 --distill ab --experiments_name ab
#   FSP    --have_mlp 0 --distill fsp --experiments_name fsp
#   WSLD, its authors'          --have_mlp 0 --distill wsld --kd_T 2 -b 2.5 --experiments_name wsld-2
#   NKD at its published tau    --have_mlp 0 --distill nkd --kd_T 1 --experiments_name nkd-1
#   MLKD as released            --have_mlp 0 --distill mlkd --mlkd_form released --experiments_name mlkd-released
#   MLKD, one view              --have_mlp 0 --distill mlkd --mlkd_views 1 --experiments_name mlkd-weak
#   DPK, half of the patches    --have_mlp 0 --distill dpk --dpk_schedule fixed:0.5 --experiments_name dpk-half
#   DPK, from all to none       --have_mlp 0 --distill dpk --dpk_schedule linear --experiments_name dpk-linear
#   DPK without prior           --have_mlp 0 --distill dpk --dpk_schedule fixed:0 --experiments_name dpk-none
#   DKD of mdistiller           --have_mlp 0 --distill dkd --dkd_weights mdistiller --experiments_name dkd-mdistiller
# Other temperatures, which go with every --distill too:
#   DTKD                        --temperature dtkd --experiments_name dtkd    -r 1 -a 1 --fixed_alpha 0.5 --kd_warmup 20
#   DTKD's weights at tau 4     --temperature fixed --experiments_name kd-dtkd-weights -r 1 -a 1.5 --kd_warmup 20
#   RLKD                        --temperature rlkd --experiments_name rlkd
#   RLKD without learning       --temperature random --experiments_name random
#   RLKD's mean                 --temperature fixed --kd_T 5.5 --experiments_name kd-5.5
#   tau falls from 7 to 1       --temperature annealing --experiments_name annealing
#   LSKD                        --temperature standardised --experiments_name standardised    -r 0.1 -a 9
#   NormKD                      --temperature normkd --experiments_name normkd
#   TTM                         --temperature ttm --experiments_name ttm    -r 1 -a 45
#   WTTM                        --temperature wttm --experiments_name wttm    -r 1 -a 4
#   CSWT                        --temperature cswt --experiments_name cswt
#   inverse difficulty          --temperature idts --experiments_name idts
#   CTKD on z-scored logits     --temperature ctkd-global --logit_stand --experiments_name ctkd-logit-stand
# Others:
#   CTKD, instance-wise         --mlp_name instance --experiments_name ctkd-instance
#   another pair                --path-t save/models/wrn_40_2_vanilla/ckpt_epoch_240.pth --model_s wrn_16_2
. "$(dirname "$0")/env.sh"

exec "$python" train_student.py --path-t ./save/models/resnet56_vanilla/ckpt_epoch_240.pth \
    --distill kd --model_s resnet20 --kd_T 4 \
    --batch_size 64 --learning_rate 0.05 \
    --have_mlp 1 --mlp_name global --t_start 1 --t_end 20 \
    --cosine_decay 1 --decay_max 0 --decay_min -1 --decay_loops 10 \
    --save_model --experiments_name fold-1 "$@"
