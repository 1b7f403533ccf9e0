#!/usr/bin/env bash
# Functions of launch/slurm.sbatch, which sources this file.
: "${job?}" "${attempt?}" "${about?}" # are its variables

field() { sed -nE "s/.* $1=([^ ]*).*/\1/p" <<<"$about"; }

show() { # COMMAND...: one line that a shell would read as this command
    printf '%q ' "$@" && echo
}

cpus_of_node() { # "64(x2),32": of nodes that differ, the smallest counts
    tr , '\n' <<<"$SLURM_JOB_CPUS_PER_NODE" | sed 's/(.*//' | sort -n | sed -n 1p
}

address_of_first_node() { # rank 0 runs there; by the address that Slurm uses, since a node's name need not resolve
    local first
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
    scontrol show node --oneliner "$first" | sed -nE 's/.* NodeAddr=([^ ]*).*/\1/p'
}

free_port() { # this script runs on the first node, too. Jobs and attempts begin to look at different numbers.
    local port=$((20000 + (SLURM_JOB_ID + 1009 * attempt) % 10000))
    while (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do
        port=$((20000 + (port + 1) % 10000))
    done
    echo "$port"
}

step="" asked="" num_asked=0
pass_on() { # SIGNAL: to the ranks, which save and stop; the checks, which note this attempt, are left to end
    asked=$1 num_asked=$((num_asked + 1))
    if [[ -n $step && ($1 == TERM || -n $ranks_run) ]]; then
        kill "-$1" "$step" 2>/dev/null || true
    fi
}

run_step() { # COMMAND...: sets `code` to the job's own exit code if it has one, else the command's
    local before
    rm -f "$MEGALIGN_RESULT_FILE"
    "$@" &
    step=$!
    while before=$num_asked; do # a signal ends `wait`, and not the command
        code=0 && wait "$step" || code=$?
        ((before < num_asked)) || break
    done
    step=""
    if [[ -s $MEGALIGN_RESULT_FILE ]]; then
        code=$(<"$MEGALIGN_RESULT_FILE")
    elif [[ -n $asked ]]; then
        code=75 how="stopped by $asked before the first step"
    elif ((code == 0)); then
        say "it ended early; a module that the job loads may have done it" && code=1
    fi
}

run_checks() { # COMMAND...
    ranks_run=""
    run_step "$@"
    if ((code == 0)) && [[ -n $asked ]]; then
        code=75 how="stopped by $asked before the ranks started"
    fi
}

run_ranks() { # LOG COMMAND...: shows what is appended to the log
    local log=$1 shown
    ranks_run=1
    touch "$log"
    tail -n 0 -F "$log" 2>/dev/null &
    shown=$!
    run_step "${@:2}"
    sleep 1 # it looks once a second
    kill "$shown" 2>/dev/null || true # a signal to all processes of the job has ended it
}

finish() { # ends the script with the job's code, after requeueing a job that stopped after saving
    local reason state
    how=${how:-"stopped after saving"}
    if ((code != 75)); then
        how="ended with code $code"
    elif state=$(about=$(scontrol show job --oneliner "$job") && field JobState) &&
        [[ $asked == TERM || $state != RUNNING ]]; then
        how+="; not requeued, since it was cancelled; the same command goes on"
    elif reason=$(scontrol requeue "$job" 2>&1); then
        how+="; requeued"
    else
        how+="; not requeued (${reason##*: }); the same command goes on"
    fi
    say "job $job, attempt $attempt: $how"
    exit "$code"
}
