#!/usr/bin/env bash
# The main job end to end on synthetic studies, on a CPU: prepare, train both bundles, evaluate, predict unseen DICOM.
# DEMO_DIR chooses another folder than demo/. A second run reuses what is there.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
mkdir -p "${DEMO_DIR:-$project/demo}"
demo=$(cd "${DEMO_DIR:-$project/demo}" && pwd)
bundles="$project/bundles"

step() { printf '\n== %s\n' "$*"; }

train() { # BUNDLE FOLDER: trains unless the folder holds the weights of a finished run of the same configs
    local configs; configs=$(cat "$bundles/$1"/configs/{train,variants/demo}.yaml | cksum)
    [ "$(cat "$demo/$2/trained" 2>/dev/null)" = "$configs" ] && return
    python -m monai.bundle run training --bundle_root "$bundles/$1" --dataset_dir "$demo/train" \
        --config_file "['$bundles/$1/configs/train.yaml','$bundles/$1/configs/variants/demo.yaml']" \
        --output_dir "$demo/$2" --ckpt_dir "$demo/$2"
    echo "$configs" >"$demo/$2/trained"
}

evaluate() { # BUNDLE FOLDER: on all unseen studies (fold -1: no part is left out)
    python -m monai.bundle run evaluating --bundle_root "$bundles/$1" --dataset_dir "$demo/unseen" --fold -1 \
        --config_file "['$bundles/$1/configs/train.yaml','$bundles/$1/configs/variants/demo.yaml','$bundles/$1/configs/evaluate.yaml']" \
        --output_dir "$demo/$2/unseen" --ckpt_dir "$demo/$2"
}

step "Synthetic studies: 160 patients to train on, 24 others to be judged by"
[ -d "$demo/train_rsna" ] || trauma-monai phantom "$demo/train_rsna" --studies 160 --seed 1 --matrix 128 --slice-thickness 7
[ -d "$demo/unseen_rsna" ] || trauma-monai phantom "$demo/unseen_rsna" --studies 24 --seed 2 --matrix 128 --slice-thickness 7

step "Prepare: checked volumes and a datalist"
trauma-monai prepare "$demo/train_rsna" "$demo/train" --folds 20
trauma-monai prepare "$demo/unseen_rsna" "$demo/unseen"

step "Train organ_ct_segmentation"
train organ_ct_segmentation organs
step "Train trauma_ct_classification"
train trauma_ct_classification trauma

step "Evaluate both on the unseen studies"
evaluate organ_ct_segmentation organs
evaluate trauma_ct_classification trauma

step "Predict the unseen studies from their DICOM files"
trauma-monai predict "$demo/unseen_rsna/train_images" "$demo/report" --variant demo \
    --organ-weights "$demo/organs/model.pt" --trauma-weights "$demo/trauma/model.pt"

step "Results on 24 unseen synthetic patients (the score counts loss: lower is better)"
trauma-monai score "$demo/unseen_rsna/train.csv" "$demo/report/submission.csv" | tee "$demo/score.txt"
printf '\nReport:                        %s\n' "$demo/report/index.html"
printf 'Mean organ Dice:               %.4f\n' \
    "$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["val_mean_dice"])' "$demo/organs/unseen/metrics.json")"
printf 'Trauma score:                  %s\n' "$(awk '$1 == "score" { print $2 }' "$demo/score.txt")"
printf 'Best constant, to be beaten:   %s\n' "$(awk '$1 == "score" { print $3 }' "$demo/score.txt")"
