#!/usr/bin/env bash
# Prepares a runner for sharing, with the commands of the system that came before; everything is done by p2pcache.
set -uo pipefail

usage() {
  cat <<'HELP'
Usage: p2p_peer_bootstrap.sh COMMAND

  init                            start this runner's node, and tell later steps of it
  register PEER_ID PORT IP        leave the address of a node in the registry, for others to find
  discover [MAX]                  list the peers that may be there, a multiaddr a line (default: 5)
  help                            show this

init writes CACHE_ENABLE_P2P, CACHE_LISTEN_PORT and CACHE_BOOTSTRAP_PEERS to the file $GITHUB_ENV, and peer_id,
peer_multiaddr and bootstrap_peers to $GITHUB_OUTPUT; outside of Actions it prints them. It starts a node where
httpx-p2pcache is installed (pip install 'httpx-p2pcache[p2p,cli]') and CACHE_SHARED_SECRET or GITHUB_TOKEN is set;
the daemon that it starts serves every later step of the job.

Variables: CACHE_LISTEN_PORT (9100), CACHE_PEER_REGISTRY ($RUNNER_TEMP/p2p_peers), CACHE_SHARED_SECRET, PYTHON (python3).
Exit status: 0 done; 1 it could not be done; 2 wrong usage.
HELP
}

say() { printf '%s\n' "$*" >&2; }

# name=value for the steps that follow: in the file that Actions reads, or on standard output.
tell() {
  local file="$1" name="$2" value="$3"
  if [ -n "$file" ]; then
    printf '%s=%s\n' "$name" "$value" >> "$file"
  else
    printf '%s=%s\n' "$name" "$value"
  fi
}

p2pcache() { "${PYTHON:-python3}" -m httpx_p2pcache.cli "$@"; }

# Of the status that p2pcache prints as JSON: peer ID, first multiaddr, port; a line each, empty where there is none.
described() {
  "${PYTHON:-python3}" -c '
import json, sys
status = json.load(sys.stdin)
peer_id, address = status["peer_id"] or "", (status["addresses"] or [""])[0]
print(peer_id, f"{address}/p2p/{peer_id}" if peer_id and address else "", address.rpartition("/tcp/")[2], sep="\n")
'
}

init() {
  local status peers peer_id multiaddr port
  local missing
  if ! missing="$(p2pcache --help 2>&1 > /dev/null)"; then
    say "${missing##*$'\n'}"
    say "httpx-p2pcache is not there for ${PYTHON:-python3}: pip install 'httpx-p2pcache[p2p,cli]'"
    return 1
  fi
  peers="$(p2pcache discover 5 2> /dev/null | paste -sd, -)"
  [ -n "${CACHE_BOOTSTRAP_PEERS:-}" ] && peers="$CACHE_BOOTSTRAP_PEERS"
  export CACHE_ENABLE_P2P="${CACHE_ENABLE_P2P:-true}"
  # A job may build for long before it asks again; the daemon ends with the job.
  status="$(p2pcache init --json --replace --idle 21600)" || return 1
  { read -r peer_id; read -r multiaddr; read -r port; } < <(described <<< "$status")
  tell "${GITHUB_ENV:-}" CACHE_ENABLE_P2P "$CACHE_ENABLE_P2P"
  tell "${GITHUB_ENV:-}" CACHE_LISTEN_PORT "${port:-${CACHE_LISTEN_PORT:-9100}}"
  # Without peers it is left unset: then others are looked for in every other way.
  [ -n "$peers" ] && tell "${GITHUB_ENV:-}" CACHE_BOOTSTRAP_PEERS "$peers"
  tell "${GITHUB_OUTPUT:-}" peer_id "$peer_id"
  tell "${GITHUB_OUTPUT:-}" peer_multiaddr "$multiaddr"
  tell "${GITHUB_OUTPUT:-}" bootstrap_peers "$peers"
  if [ -n "$peer_id" ]; then
    say "this runner shares as $multiaddr"
  else
    say "this runner does not share: $(p2pcache status 2> /dev/null | sed -n 's/^sharing: *//p')"
  fi
}

register() {
  if [ "$#" -ne 3 ]; then
    say "register takes PEER_ID, PORT and IP"
    return 2
  fi
  p2pcache register "$1" "$2" "$3"
}

discover() {
  if [ "$#" -gt 1 ] || ! [[ "${1:-5}" =~ ^[1-9][0-9]*$ ]]; then
    say "discover takes a number of peers, of at least 1"
    return 2
  fi
  p2pcache discover "${1:-5}"
  local code=$?
  [ "$code" -eq 1 ] && return 0 # nobody is there yet: no reason to fail a step
  return "$code"
}

case "${1:-}" in
  init | register | discover)
    command="$1"
    shift
    "$command" "$@"
    ;;
  help | -h | --help)
    usage
    ;;
  *)
    usage >&2
    exit 2
    ;;
esac
