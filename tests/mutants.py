"""``python -m tests.mutants``: each defence is taken away in a copy of the package, and its test has to fail then.

A line each: the test that went red, or the mutant that survived. Exit status 1 if one did.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
ATTACKS, FAULTS = "integration/test_attacks.py", "integration/test_faults.py"
HOSTILE = "unit/test_hostile.py"
STRICT, HARDENING = "integration/test_strictness.py", "integration/test_hardening.py"
CONFORMANCE = "conformance/test_rfc9111.py::test_sync"


class Mutant(NamedTuple):
    """In ``file`` the text ``old`` becomes ``new``; then ``test`` fails."""

    file: str
    old: str
    new: str
    test: str


MUTANTS = [
    Mutant(
        "node/embedded.py",
        "            asked.cancel()\n",
        "",
        "integration/test_fleet.py::test_what_is_granted_to_who_was_interrupted_while_asking_goes_back",
    ),
    Mutant(
        "node/home.py",
        "if self._published_so_far == so_far:",
        "if True:",
        "integration/test_fleet.py::test_what_is_published_while_the_home_looks_for_it_is_given_and_not_granted",
    ),
    Mutant(
        "runner.py",
        "        util.Finalize(None, _finish_all, exitpriority=0)\n",
        "",
        "integration/test_processes.py::"
        "test_what_a_child_of_multiprocessing_has_paid_for_and_counted_is_there_once_it_has_ended",
    ),
    Mutant(
        "imports.py",
        "        if one.acquire(timeout=IMPORT_SECONDS):",
        "        if False:",
        "integration/test_processes.py::"
        "test_what_a_child_of_multiprocessing_has_paid_for_and_counted_is_there_once_it_has_ended[inherited]",
    ),
    Mutant(
        "node/questions.py",
        "_Question(self, asked, future), self._fleet.store.peek,",
        "_Question(self, asked, future), self._fleet.shelf.at_hand,",
        "integration/test_fleet.py::test_who_asks_touches_no_disk_in_a_thread_that_may_be_a_loops",
    ),
    Mutant(
        "node/shortcuts.py",
        "if self._descriptor() != descriptor:",
        "if False:",
        "integration/test_shortcuts.py::"
        "test_who_reads_from_what_is_closed_in_the_same_moment_takes_nothing_from_who_has_its_descriptor_then",
    ),
    Mutant(
        "node/shortcuts.py",
        "            self.raw.soon(self._muxer.abandon)\n",
        "",
        "integration/test_shortcuts.py::test_a_connection_whose_writer_is_interrupted_is_given_up",
    ),
    Mutant(
        "node/fleet.py",
        "self._every(self._watch_seconds(), self.presence.watch)",
        "self._every(WATCH_SECONDS, self.presence.watch)",
        "simulation/test_simulated.py::test_where_a_publication_is_lost_one_of_those_who_wait_fetches_for_all",
    ),
    Mutant(
        "node/questions.py",
        "        return in_time and ",
        "        return ",
        "integration/test_fleet.py::test_who_asks_after_a_while_has_an_answer_also_if_the_home_says_nothing",
    ),
    Mutant(
        "node/turn.py",
        "taken[0] and self._asleep and func()",
        "taken[0] and func()",
        "unit/test_turn.py::test_a_loop_goes_on_without_the_turn_that_is_not_given_back_and_lends_it_again_once_it_is",
    ),
    Mutant(
        "node/turn.py",
        "self._held = self._lock.acquire(timeout=LOST_SECONDS)",
        "self._held = True",
        "unit/test_turn.py::test_a_loop_and_other_threads_are_never_inside_at_the_same_time",
    ),
    Mutant(
        "runner.py",
        "    exchange.store.catch_up()\n",
        "",
        "integration/test_fleet.py::test_a_runner_that_closes_has_published_what_it_has_read",
    ),
    Mutant(
        "keep.py",
        "wanted = exchange.network.in_demand or",
        "wanted =",
        "integration/test_fleet.py::test_nothing_is_put_off_in_a_fleet_whose_members_ask_for_the_same",
    ),
    Mutant(
        "keep.py",
        " or exchange.flights.is_waited_for(lease.claim)",
        "",
        "integration/test_fleet.py::test_threads_that_wait_for_what_one_fetches_have_it_at_once",
    ),
    Mutant(
        "keep.py",
        "if not self._put_off:",
        "if True:",
        "integration/test_fleet.py::test_a_runner_that_closes_has_published_what_it_has_read",
    ),
    Mutant(
        "machine.py",
        'return _machine() if local else b""',
        'return b""',
        "unit/test_entries.py::test_a_host_that_is_another_one_on_each_machine_has_other_keys_on_each",
    ),
    Mutant(
        "exchange.py",
        '("private", "proxy-revalidate", "s-maxage")',
        '("proxy-revalidate", "s-maxage")',
        f"{STRICT}::test_what_is_private_as_well_as_public_is_for_nobody_else",
    ),
    Mutant(
        "exchange.py",
        'if "set-cookie" in stored.entry.headers:',
        "if False:",
        f"{STRICT}::test_a_public_answer_that_sets_a_cookie_is_for_its_token_alone",
    ),
    Mutant(
        "lookup.py",
        'FOR_THE_ORIGIN = frozenset({"host", ',
        "FOR_THE_ORIGIN = frozenset({",
        f"{STRICT}::test_one_virtual_host_s_answer_is_not_another_s",
    ),
    Mutant(
        "node/home.py",
        "self._claims.forget(lambda asker: asker.link is link",
        "self._claims.forget(lambda asker: False",
        f"{HARDENING}::test_who_asks_again_on_another_link_is_not_told_to_wait_for_itself",
    ),
    Mutant(
        "node/host.py",
        "await muxer.abandon()",
        "pass",
        f"{HARDENING}::test_strangers_that_flood_and_never_read_are_gone_soon_after_their_time",
    ),
    Mutant(
        "node/reach.py",
        "if said.turn >= member.turn:",
        "if True:",
        f"{ATTACKS}::test_what_a_member_has_said_later_on_another_link_is_not_taken_back",
    ),
    Mutant(
        "store.py",
        "if remembered.state != state_of(self._file.connected.rows(key)):",
        "if False:",
        "unit/test_store.py::test_memory_is_given_up_when_another_store_has_renewed_an_entry",
    ),
    Mutant(
        "node/shortcuts.py",
        "if kind == TYPE_DATA and length > window:",
        "if False:",
        "integration/test_shortcuts.py::test_who_sends_more_than_the_window_is_cut_off_and_nobody_else_is",
    ),
    Mutant(
        "node/questions.py",
        "                self._overdue(question)\n",
        "                self._drop(question)\n",
        "integration/test_processes.py"
        "::test_a_frozen_process_fails_no_request_and_delays_none_is_let_go_and_comes_back_once_it_goes_on",
    ),
    Mutant(
        "lookup.py",
        "if exchange.flights.landed != landed:",
        "if False:",
        "integration/test_transport.py::test_fifty_threads_that_ask_one_cold_url_make_one_call",
    ),
    Mutant(
        "store.py",
        "if noted(self._file.connected, key, identity, since):",
        "if False:",
        "unit/test_store.py::test_a_write_of_another_process_makes_void_what_is_unwritten_here",
    ),
    Mutant(
        "store.py",
        "            if flushed:\n                self.flush()\n",
        "",
        "unit/test_store.py::test_what_is_taken_away_is_not_written_later",
    ),
    Mutant(
        "node/presence.py",
        "if member.heard() <= began:",
        "if True:",
        f"{ATTACKS}::test_a_member_that_answers_no_ping_is_dropped_unless_it_is_heard_of",
    ),
    Mutant(
        "node/checks.py",
        'raise Rejected("its body is in a coding that is not checked")',
        "return",
        f"{HOSTILE}::test_a_body_that_is_not_what_its_coding_says_is_not_believed",
    ),
    Mutant(
        "node/search.py",
        "return due[: DIALS_AT_ONCE - under_way]",
        "return due",
        "unit/test_search.py::test_no_more_than_so_many_are_dialled_at_once",
    ),
    Mutant(
        "node/presence.py",
        "surplus = max(0, len(fleet.members) - MAX_LINKS)",
        "surplus = 0",
        "simulation/test_large_fleets.py::test_more_than_a_node_can_keep_are_let_go",
    ),
    Mutant(
        "entries.py",
        "if cache_key(entry.url) != key:",
        "if False:",
        "unit/test_entries.py::test_an_entry_sealed_for_a_key_that_is_not_its_urls_is_rejected",
    ),
    Mutant(
        "entries.py",
        "entry.identity == self.identity and hmac.compare_digest(self._voucher(entry), entry.voucher)",
        "entry.identity == self.identity",
        f"{ATTACKS}::test_a_member_cannot_pass_an_entry_off_as_one_that_another_token_has_fetched",
    ),
    Mutant(
        "node/checks.py",
        'if "set-cookie" in entry.headers or',
        "if",
        f"{ATTACKS}::test_a_forged_entry_is_never_an_answer",
    ),
    Mutant(
        "node/checks.py",
        "if _PAGINATION.search(parameters) and not same_origin(url, entry.url):",
        "if False:",
        f"{ATTACKS}::test_a_forged_entry_is_never_an_answer",
    ),
    Mutant(
        "node/checks.py",
        "    _check_coding(entry)\n",
        "",
        f"{HOSTILE}::test_a_body_that_is_not_what_its_coding_says_is_not_believed",
    ),
    Mutant(
        "node/checks.py",
        "MAX_UNPACKED = 128 * 1024**2",
        "MAX_UNPACKED = 2**62",
        f"{ATTACKS}::test_a_bomb_of_another_identity_is_not_unpacked",
    ),
    Mutant(
        "freshness.py",
        "return line if len(line) < 256 else",
        "return line if True else",
        f"{HOSTILE}::test_checking_an_entry_never_takes_longer_than_a_peer_may_delay_a_request",
    ),
    Mutant(
        "entries.py",
        "(?:[^=&?]*(?:token",
        "(?:[^=&]*(?:token",
        f"{HOSTILE}::test_checking_an_entry_never_takes_longer_than_a_peer_may_delay_a_request",
    ),
    Mutant(
        "network.py",
        "if not may_select(self.selecting):",
        "if False:",
        f"{HOSTILE}::test_a_question_is_not_larger_than_the_fields_of_a_request_can_be",
    ),
    Mutant(
        "quota.py",
        "min(quota.seen, now)",
        "quota.seen",
        f"{HOSTILE}::test_a_refusal_that_a_member_has_seen_in_the_future_is_probed_once_a_minute_like_any_other",
    ),
    Mutant(
        "claims.py",
        "if self._waiting >= self._limit:",
        "if False:",
        "unit/test_claims.py::test_beyond_the_limit_everybody_is_let_go_but_those_in_flight_go_on",
    ),
    Mutant(
        "node/protocol.py",
        "    if not any(agreeing):",
        "    if False:",
        "unit/test_protocol.py",
    ),
    Mutant(
        "node/protocol.py",
        'bound = len(dialler).to_bytes(2, "big") + dialler + listener + nonces',
        "bound = nonces",
        f"{ATTACKS}::test_a_stranger_that_passes_on_a_proof_is_admitted_by_neither",
    ),
    Mutant(
        "node/gate.py",
        "UPGRADE_SECONDS if self._inside <= MAX_STRANGERS // 2 else UPGRADE_CROWDED_SECONDS",
        "UPGRADE_SECONDS",
        "unit/test_search.py::test_who_comes_in_a_crowd_has_less_time_to_show_who_it_is",
    ),
    Mutant(
        "node/gate.py",
        "count >= MAX_FAILURES or self._inside >= MAX_STRANGERS",
        "self._inside >= MAX_STRANGERS",
        "unit/test_search.py::test_an_address_of_which_many_have_failed_is_kept_out_for_a_while_and_no_other_is",
    ),
    Mutant(
        "node/gate.py",
        "count >= MAX_FAILURES or self._inside >= MAX_STRANGERS",
        "count >= MAX_FAILURES",
        "unit/test_search.py::test_the_gate_lets_in_so_many_strangers_at_a_time_and_the_next_when_one_has_left",
    ),
    Mutant(
        "settings.py",
        "return len(secret) < 16 or len(set(secret)) < 8",
        "return False",
        "integration/test_transport.py::test_a_local_cache_says_once_what_is_off_and_what_to_set",
    ),
    Mutant(
        "files.py",
        "if not stat.S_ISREG(path.lstat().st_mode):",
        "if False:",
        f"{FAULTS}::test_a_link_in_the_place_of_the_ledger_is_not_followed",
    ),
    Mutant(
        "files.py",
        "os.O_RDONLY | NOFOLLOW | os.O_NONBLOCK",
        "os.O_RDONLY | NOFOLLOW",
        f"{FAULTS}::test_a_pipe_in_the_place_of_a_file_hangs_nothing",
    ),
    Mutant(
        "files.py",
        "temporary.replace(path)",
        "pass",
        f"{FAULTS}::test_a_local_secret_that_was_cut_short_does_not_make_the_cache_useless_for_ever",
    ),
    Mutant(
        "node/daemon/client.py",
        "connection.settimeout(GREETING_SECONDS)",
        "connection.settimeout(None)",
        f"{FAULTS}::test_somebody_elses_socket_in_the_place_of_the_daemons_holds_up_nothing",
    ),
    Mutant(
        "node/discovery/registry.py",
        "not abs(now - record.written) <= self._ttl + MAX_DIFFERENCE",
        "False",
        f"{HOSTILE}::test_a_record_of_the_far_future_does_not_count_for_ever",
    ),
    Mutant(
        "opened.py",
        'logging.getLogger("hishel._core._storages._sync_sqlite").addFilter(_SaidOnce())',
        "",
        f"{FAULTS}::test_a_database_that_somebody_holds_for_long_delays_a_request_by_no_more_than_a_write_may_wait",
    ),
    Mutant(
        "store.py",
        "            self._file.complain()\n        return free",
        "        return free",
        f"{FAULTS}::test_on_a_full_disk_requests_are_answered_and_it_is_said_once",
    ),
    Mutant(
        "database.py",
        "isolation_level=None, timeout=BUSY_MS / 1000",
        "isolation_level=None, timeout=5",
        f"{FAULTS}::test_a_database_that_nobody_else_can_even_read_is_not_waited_for_long",
    ),
    Mutant(
        "rows.py",
        "body = entry.body if sealing is None else",
        "body = entry.body if True else",
        "unit/test_store.py::test_bodies_at_rest_are_sealed_and_under_another_key_the_store_is_cold",
    ),
    Mutant(
        "fetch.py",
        'if "no-store" in directives(reply.headers):  # §5.2.2.5: nothing',
        "if False:  # §5.2.2.5: nothing",
        f"{CONFORMANCE}[of a 304 with no-store nothing is stored (5.2.2.5)]",
    ),
    Mutant(
        "fetch.py",
        'and sent != theirs and "etag" not in reply.headers',
        "and False",
        f"{STRICT}::test_a_304_without_a_tag_to_the_caller_s_tag_and_ours_does_not_say_that_the_caller_s_is_right",
    ),
    Mutant(
        "origins.py",
        "            self._prepare_to_load()  # the next request tries again\n",
        "",
        "integration/test_transport.py::test_an_ssl_context_that_could_not_be_loaded_is_loaded_again",
    ),
    Mutant(
        "freshness.py",
        "return min(max(apparent_age, age_value + delay), _LONGEST)",
        "return max(apparent_age, age_value + delay)",
        f"{FAULTS}::test_what_an_origin_says_does_not_cost_a_process_its_daemon",
    ),
]


def main() -> int:
    survived = 0
    for mutant in MUTANTS:
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch) / "httpx_p2pcache"
            shutil.copytree(ROOT / "httpx_p2pcache", copy, ignore=shutil.ignore_patterns("__pycache__"))
            path = copy / mutant.file
            text = path.read_text()
            if text.count(mutant.old) != 1:
                print(f"GONE      {mutant.file}: {mutant.old.strip()[:70]!r} is not there once")
                survived += 1
                continue
            path.write_text(text.replace(mutant.old, mutant.new))
            options = ["-q", "-x", "-p", "no:cacheprovider", "-c", f"{ROOT}/pyproject.toml", "--rootdir", str(ROOT)]
            done = subprocess.run(
                [sys.executable, "-m", "pytest", *options, f"{ROOT}/tests/{mutant.test}"],
                cwd=scratch,  # which Python looks into first
                env=os.environ | {"PYTHONPATH": scratch},
                capture_output=True,
                text=True,
            )
        red = done.returncode == 1
        survived += not red
        print(f"{'red' if red else 'SURVIVED':9} {mutant.test.rpartition('/')[2]}", flush=True)
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
