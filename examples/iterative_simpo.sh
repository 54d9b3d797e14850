#!/usr/bin/env bash
# Rounds of SimPO on pairs of the policy's own answers: generate, score, train, and again with what was trained.
#
#   examples/iterative_simpo.sh MODEL_DIR REWARD_MODEL_DIR PROMPTS OUT ROUNDS [options of simpo train ...]
#
# The same command continues a stage that was stopped. SAMPLES, TEMPERATURE, MAX_NEW_TOKENS and PAIRS_OPTIONS are read
# from the environment.
set -euo pipefail

if (($# < 5)); then
  sed -n '2,7s/^# \{0,1\}//p' "$0"
  exit 2
fi
model=$1 reward_model=$2 prompts=$3 out=$4 rounds=$5
shift 5

for ((round = 1; round <= rounds; round++)); do
  folder=$out/round-$round
  if [[ -d $folder/hf ]]; then
    echo "== round $round of $rounds is done: $folder/hf"
  else
    echo "== round $round of $rounds, from $model"
    simpo generate --model "$model" --prompts "$prompts" --out "$folder/answers" --samples "${SAMPLES:-5}" \
      --temperature "${TEMPERATURE:-0.8}" --max-new-tokens "${MAX_NEW_TOKENS:-1024}"
    simpo pairs --answers "$folder/answers" --reward-model "$reward_model" --out "$folder/pairs" ${PAIRS_OPTIONS:-}
    simpo train --model "$model" --data "$folder/pairs/pairs.jsonl" --save "$folder/run" --export-hf "$folder/hf" "$@"
  fi
  model=$folder/hf
done
