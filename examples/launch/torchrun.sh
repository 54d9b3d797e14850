#!/usr/bin/env bash
# Start the ranks of this node by torchrun, on one node or, alike, on each of several:
#
#   examples/launch/torchrun.sh --config FILE --model DIR --data FILE
#   NODES=8 HOST=node0:29500 examples/launch/torchrun.sh --config FILE --model DIR --data FILE
#
# NODES     how many nodes (1)
# HOST      name and port of one of them, where they meet; the others need to reach it
# PER_NODE  GPUs of a node (8)
# MEETING   seconds in which all nodes have to come (150)
#
# A job of Kubeflow's training operator says all this in variables of its own (PET_...), which torchrun reads.
# SIGTERM and SIGUSR1 are passed on to the ranks as SIGUSR1: they finish their step, save, and end, so that the same
# command continues from there. torchrun by itself would kill them 30 seconds after a SIGTERM.
set -u

rendezvous=(--nnodes "${NODES:-1}" --nproc-per-node "${PER_NODE:-8}")
if [ -n "${PET_NNODES:-}" ]; then
  # Not every version of the operator hands on nprocPerNode.
  rendezvous=(--nproc-per-node "${PET_NPROC_PER_NODE:-${PER_NODE:-8}}")
elif [ "${NODES:-1}" = 1 ]; then
  rendezvous+=(--standalone)
else
  rendezvous+=(--rdzv-backend c10d --rdzv-endpoint "${HOST:?name and port of the node where all meet}")
fi

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"

# Set before the agent starts, so that no signal finds the script without it.
agent=
stop() {
  local ranks
  agent=${agent:-${!:-}}
  [ -n "$agent" ] || exit 143
  is_over=false
  mapfile -t ranks < <(pgrep -P "$agent")
  if [ "${#ranks[@]}" = 0 ]; then
    kill "$agent"
    return
  fi
  kill -USR1 "${ranks[@]}"
  # An agent that may restart its ranks would do so here, on a node that is about to go.
  if [ "${PET_MAX_RESTARTS:-0}" -gt 0 ]; then
    while kill -0 "${ranks[@]}" 2>/dev/null; do sleep 0.2; done
    kill "$agent"
  fi
}
trap stop TERM USR1
torchrun "${rendezvous[@]}" examples/pretrain_simpo.py "$@" &
agent=$!

# Agents start ranks once all have come, and wait in silence. Pods come as they find room, so that a job of Kubernetes has
# a deadline of its own.
meet() {
  local second
  for ((second = 0; second < ${MEETING:-150}; second++)); do
    sleep 1
    if ! kill -0 "$agent" 2>/dev/null || pgrep -P "$agent" >/dev/null; then return 0; fi
  done
  kill "$agent"
  while kill -0 "$agent" 2>/dev/null; do sleep 0.2; done
  echo "ERROR simpo_megatron: NODES: found fewer than $NODES after ${MEETING:-150} s, expected torchrun.sh on each; see" \
    "whether the others run it with the same NODES and HOST, and reach $HOST from there" >&2
  return 6
}
meeting=
if [ -z "${PET_NNODES:-}" ] && [ "${NODES:-1}" != 1 ]; then
  meet &
  meeting=$!
fi
is_over=false
code=127
until $is_over; do
  # A signal ends a wait, and with it this round; the agent's own code is what a wait without one returns.
  is_over=true
  wait "$agent"
  ended=$?
  # Which knows nothing of an agent whose code an earlier one has returned.
  [ "$ended" = 127 ] || code=$ended
done
if [ -n "$meeting" ]; then wait "$meeting" || code=$?; fi
exit "$code"
