"""The tables and functions of queues in PostgreSQL, and how they come there.

    queue_name         the queues, by number
    queue_message      the live messages, whatever they are doing: see `state`
    queue_dedupe       deduplication ids, and until when they count
    queue_dead_letter  what was given up
    queue_migration    which of the steps below were made

| `state` | the message | `at` |
|---|---|---|
| 0 | waits | |
| 1 | is not due yet | when it will be |
| 2 | is being worked on | when its lease is over |
| 3 | stands behind another one of its key | |

Each step is made once, in one transaction, by whoever comes first. The functions are put in anew with each step that
changes them; a client of an older version goes on calling them, so their signatures only change under another name.
"""

from __future__ import annotations

from typing import Final

__all__ = ["MIGRATIONS"]

_TABLES: Final = """
CREATE SEQUENCE queue_seq CACHE 1;

CREATE TABLE queue_name (
    queue_no int GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name     text NOT NULL UNIQUE
);

CREATE TABLE queue_message (
    n                bigint PRIMARY KEY,
    queue_no         int NOT NULL REFERENCES queue_name,
    state            smallint NOT NULL,
    rank             smallint NOT NULL,
    arrival          bigint NOT NULL,
    at               timestamptz,
    attempt          int NOT NULL DEFAULT 0,
    epoch            int NOT NULL DEFAULT 0,
    due              timestamptz,
    id               text NOT NULL,
    key              text,
    deduplication_id text,
    enqueued_at      timestamptz NOT NULL,
    headers          json NOT NULL,
    body             bytea NOT NULL
) WITH (
    autovacuum_vacuum_scale_factor = 0.0, autovacuum_vacuum_threshold = 5000,
    autovacuum_vacuum_insert_scale_factor = 0.0, autovacuum_vacuum_insert_threshold = 50000,
    autovacuum_vacuum_cost_delay = 0
);
CREATE INDEX queue_message_ready ON queue_message (queue_no, rank, arrival) WHERE state = 0;
CREATE INDEX queue_message_timed ON queue_message (queue_no, at) WHERE at IS NOT NULL;
CREATE INDEX queue_message_lane ON queue_message (queue_no, key, n) WHERE key IS NOT NULL;

CREATE TABLE queue_dedupe (
    queue_no int NOT NULL REFERENCES queue_name,
    id       text NOT NULL,
    until    timestamptz NOT NULL,
    PRIMARY KEY (queue_no, id)
);
CREATE INDEX queue_dedupe_until ON queue_dedupe (queue_no, until);

CREATE TABLE queue_dead_letter (
    queue_no         int NOT NULL REFERENCES queue_name,
    id               text NOT NULL,
    failed_at        timestamptz NOT NULL,
    attempt          int NOT NULL,
    reason           text NOT NULL,
    error_code       text,
    error_message    text,
    traceback        text,
    rank             smallint NOT NULL,
    key              text,
    deduplication_id text,
    enqueued_at      timestamptz NOT NULL,
    headers          json NOT NULL,
    body             bytea NOT NULL,
    PRIMARY KEY (queue_no, id)
);
CREATE INDEX queue_dead_letter_failed ON queue_dead_letter (queue_no, failed_at, id);
"""

# The planner must not take a table for small because it was so when somebody last counted.
_PLANS: Final = """
    SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET plan_cache_mode = force_generic_plan SET search_path = {schema}, pg_temp
"""

_FUNCTIONS: Final = (
    """
-- Whoever enters a lane and whoever leaves it must see each other: one at a time.
CREATE OR REPLACE FUNCTION queue_lock_lanes(p_queue int, p_keys text[]) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    v_key text;
BEGIN
    FOR v_key IN SELECT DISTINCT k FROM unnest(p_keys) k WHERE k IS NOT NULL ORDER BY k LOOP
        PERFORM pg_advisory_xact_lock(hashtextextended(v_key, p_queue));
    END LOOP;
END $$;

CREATE OR REPLACE FUNCTION queue_send(
    p_queue int, p_channel text, p_most int, p_window interval, p_ids text[], p_bodies bytea[], p_headers text[],
    p_ranks smallint[], p_keys text[], p_doubles text[], p_delays bigint[], p_enqueued timestamptz[]
) RETURNS boolean[] LANGUAGE plpgsql"""
    + _PLANS
    + """AS $$
DECLARE
    v_new boolean[] := array_fill(true, ARRAY[cardinality(p_ids)]);
    v_count bigint;
    v_at int;
    v_behind boolean;
BEGIN
    IF array_remove(p_doubles, NULL) <> '{{}}' THEN
        DELETE FROM queue_dedupe d WHERE d.ctid = ANY (ARRAY(
            SELECT o.ctid FROM queue_dedupe o WHERE o.queue_no = p_queue AND o.until < now()
            ORDER BY o.until LIMIT 100 FOR UPDATE SKIP LOCKED));
        WITH firsts AS (
            SELECT DISTINCT ON (u.id) u.id, u.pos FROM unnest(p_doubles) WITH ORDINALITY u(id, pos)
            WHERE u.id IS NOT NULL ORDER BY u.id, u.pos
        ), entered AS (
            INSERT INTO queue_dedupe AS d (queue_no, id, until)
            SELECT p_queue, f.id, now() + p_window FROM firsts f ORDER BY f.id
            ON CONFLICT (queue_no, id) DO UPDATE SET until = excluded.until WHERE d.until < now()
            RETURNING d.id
        )
        SELECT array_agg(u.id IS NULL OR f.pos IS NOT NULL AND e.id IS NOT NULL ORDER BY u.pos) INTO v_new
        FROM unnest(p_doubles) WITH ORDINALITY u(id, pos)
        LEFT JOIN firsts f ON f.id = u.id AND f.pos = u.pos
        LEFT JOIN entered e ON e.id = u.id;
    END IF;
    v_count := cardinality(array_remove(v_new, false));
    IF v_count = 0 THEN
        RETURN v_new;
    END IF;
    IF p_most IS NOT NULL AND v_count + (
        SELECT count(*) FROM (SELECT 1 FROM queue_message m WHERE m.queue_no = p_queue LIMIT p_most + 1) c
    ) > p_most THEN
        RAISE EXCEPTION 'QUEUEFULL';
    END IF;
    INSERT INTO queue_message (
        n, queue_no, state, rank, arrival, at, id, key, deduplication_id, enqueued_at, headers, body
    )
    SELECT o.n, p_queue, CASE WHEN o.delay > 0 THEN 1 ELSE 0 END, o.rank, o.n,
        CASE WHEN o.delay > 0 THEN now() + o.delay * interval '1 millisecond' END,
        o.id, NULL, o.double, o.enqueued_at, o.headers::json, o.body
    FROM (
        SELECT nextval('queue_seq') AS n, u.* FROM (
            SELECT * FROM unnest(
                p_ids, p_bodies, p_headers, p_ranks, p_keys, p_doubles, p_delays, p_enqueued, v_new
            ) WITH ORDINALITY i(id, body, headers, rank, key, double, delay, enqueued_at, is_new, pos)
            WHERE i.is_new AND i.key IS NULL ORDER BY i.pos
        ) u
    ) o;
    IF array_remove(p_keys, NULL) <> '{{}}' THEN
        PERFORM queue_lock_lanes(p_queue, p_keys);
        FOR v_at IN 1 .. cardinality(p_ids) LOOP
            CONTINUE WHEN NOT v_new[v_at] OR p_keys[v_at] IS NULL;
            v_behind := EXISTS (
                SELECT 1 FROM queue_message m WHERE m.queue_no = p_queue AND m.key = p_keys[v_at]);
            INSERT INTO queue_message (
                n, queue_no, state, rank, arrival, at, due, id, key, deduplication_id, enqueued_at, headers, body
            )
            SELECT s.n, p_queue,
                CASE WHEN v_behind THEN 3 WHEN p_delays[v_at] > 0 THEN 1 ELSE 0 END, p_ranks[v_at], s.n,
                CASE WHEN NOT v_behind THEN s.due END, CASE WHEN v_behind THEN s.due END,
                p_ids[v_at], p_keys[v_at], p_doubles[v_at], p_enqueued[v_at], p_headers[v_at]::json, p_bodies[v_at]
            FROM (
                SELECT nextval('queue_seq') AS n,
                    CASE WHEN p_delays[v_at] > 0 THEN now() + p_delays[v_at] * interval '1 millisecond' END AS due
            ) s;
        END LOOP;
    END IF;
    PERFORM pg_notify(p_channel, '');
    RETURN v_new;
END $$;

-- Of each settlement: a(ck), r(etry), l (release) or b(ury), the number and epoch of the message, a delay, a letter.
-- Rows that come back: what = 0, a settlement that came too late; 1, a message; 2, milliseconds until something is due.
CREATE OR REPLACE FUNCTION queue_exchange(
    p_queue int, p_channel text, p_limit int, p_lease interval,
    p_kinds text[], p_ns bigint[], p_epochs int[], p_delays bigint[], p_letters json[]
) RETURNS TABLE (
    what int, n bigint, epoch int, attempt int, id text, body bytea, headers text, rank smallint, key text,
    deduplication_id text, enqueued_at timestamptz, next_ms float8
) LANGUAGE plpgsql"""
    + _PLANS
    + """AS $$
#variable_conflict use_column
DECLARE
    v_done bigint[] := '{{}}';
    v_some bigint[];
    v_keys text[] := '{{}}';
    v_ended text[] := '{{}}';
    v_key text;
    v_ring boolean := false;
    v_next timestamptz;
BEGIN
    IF cardinality(p_ns) > 0 THEN
        v_keys := ARRAY(SELECT m.key FROM unnest(p_ns) s, LATERAL (
            SELECT o.key FROM queue_message o WHERE o.n = s.s AND o.key IS NOT NULL) m);
        IF v_keys <> '{{}}' THEN
            PERFORM queue_lock_lanes(p_queue, v_keys);
        END IF;
        IF 'a' = ANY (p_kinds) THEN
            WITH gone AS (
                DELETE FROM queue_message m USING unnest(p_kinds, p_ns, p_epochs) s(kind, n, epoch)
                WHERE s.kind = 'a' AND m.n = s.n AND m.epoch = s.epoch AND m.state = 2
                RETURNING m.n, m.key
            )
            SELECT array_agg(g.n), array_agg(g.key) FILTER (WHERE g.key IS NOT NULL) INTO v_some, v_ended FROM gone g;
            v_done := v_done || v_some;
        END IF;
        IF 'b' = ANY (p_kinds) THEN
            WITH gone AS (
                DELETE FROM queue_message m USING unnest(p_kinds, p_ns, p_epochs, p_letters) s(kind, n, epoch, letter)
                WHERE s.kind = 'b' AND m.n = s.n AND m.epoch = s.epoch AND m.state = 2
                RETURNING m.*, s.letter
            ), buried AS (
                INSERT INTO queue_dead_letter (
                    queue_no, id, failed_at, attempt, reason, error_code, error_message, traceback, rank, key,
                    deduplication_id, enqueued_at, headers, body
                )
                SELECT DISTINCT ON (g.id) p_queue, g.id, (g.letter->>'failed_at')::timestamptz,
                    (g.letter->>'attempt')::int, g.letter->>'reason', g.letter->>'error_code',
                    g.letter->>'error_message', g.letter->>'traceback', g.rank, g.key, g.deduplication_id,
                    g.enqueued_at, g.headers, g.body
                FROM gone g ORDER BY g.id
                ON CONFLICT (queue_no, id) DO UPDATE SET
                    failed_at = excluded.failed_at, attempt = excluded.attempt, reason = excluded.reason,
                    error_code = excluded.error_code, error_message = excluded.error_message,
                    traceback = excluded.traceback, body = excluded.body, headers = excluded.headers
            )
            SELECT array_agg(g.n), v_ended || array_agg(g.key) FILTER (WHERE g.key IS NOT NULL)
            INTO v_some, v_ended FROM gone g;
            v_done := v_done || v_some;
        END IF;
        IF 'r' = ANY (p_kinds) OR 'l' = ANY (p_kinds) THEN
            WITH back AS (
                UPDATE queue_message m SET
                    state = CASE WHEN s.kind = 'r' AND s.delay > 0 THEN 1 ELSE 0 END,
                    at = CASE WHEN s.kind = 'r' AND s.delay > 0 THEN now() + s.delay * interval '1 millisecond' END,
                    arrival = CASE WHEN s.kind = 'r' THEN nextval('queue_seq') ELSE m.n END,
                    attempt = m.attempt - CASE WHEN s.kind = 'l' THEN 1 ELSE 0 END
                FROM unnest(p_kinds, p_ns, p_epochs, p_delays) s(kind, n, epoch, delay)
                WHERE s.kind IN ('r', 'l') AND m.n = s.n AND m.epoch = s.epoch AND m.state = 2
                RETURNING m.n
            )
            SELECT array_agg(b.n) INTO v_some FROM back b;
            v_done := v_done || v_some;
            v_ring := v_some IS NOT NULL;
        END IF;
        FOREACH v_key IN ARRAY coalesce(v_ended, '{{}}') LOOP
            UPDATE queue_message m SET
                state = CASE WHEN m.due > now() THEN 1 ELSE 0 END, at = CASE WHEN m.due > now() THEN m.due END,
                arrival = nextval('queue_seq'), due = NULL
            WHERE m.n = (
                SELECT o.n FROM queue_message o WHERE o.queue_no = p_queue AND o.key = v_key ORDER BY o.n LIMIT 1
            ) AND m.state = 3;
            v_ring := v_ring OR FOUND;
        END LOOP;
        RETURN QUERY SELECT 0, s.n, s.epoch, NULL::int, NULL::text, NULL::bytea, NULL::text, NULL::smallint, NULL::text,
            NULL::text, NULL::timestamptz, NULL::float8
        FROM unnest(p_ns, p_epochs) s(n, epoch) WHERE s.n <> ALL (v_done);
    END IF;

    SELECT m.at INTO v_next FROM queue_message m WHERE m.queue_no = p_queue AND m.at IS NOT NULL ORDER BY m.at LIMIT 1;
    IF v_next <= now() THEN
        UPDATE queue_message m SET
            state = 0, at = NULL, arrival = nextval('queue_seq'),
            epoch = m.epoch + CASE WHEN m.state = 2 THEN 1 ELSE 0 END  -- whoever had it is late from now on
        WHERE m.n = ANY (ARRAY(
            SELECT o.n FROM queue_message o WHERE o.queue_no = p_queue AND o.at <= now()
            ORDER BY o.at LIMIT 256 FOR UPDATE SKIP LOCKED));
        v_ring := v_ring OR FOUND;
        SELECT m.at INTO v_next FROM queue_message m WHERE m.queue_no = p_queue AND m.at > now() ORDER BY m.at LIMIT 1;
    END IF;
    IF p_limit > 0 THEN
        RETURN QUERY
        WITH taken AS (
            UPDATE queue_message m SET
                state = 2, at = now() + p_lease, attempt = m.attempt + 1, epoch = m.epoch + 1
            WHERE m.n = ANY (ARRAY(
                SELECT o.n FROM queue_message o WHERE o.queue_no = p_queue AND o.state = 0
                ORDER BY o.rank, o.arrival LIMIT p_limit FOR UPDATE SKIP LOCKED))
            RETURNING m.*
        )
        SELECT 1, t.n, t.epoch, t.attempt, t.id, t.body, t.headers::text, t.rank, t.key, t.deduplication_id,
            t.enqueued_at, NULL::float8
        FROM taken t ORDER BY t.rank, t.arrival;
    END IF;
    IF v_next IS NOT NULL THEN
        RETURN QUERY SELECT 2, NULL::bigint, NULL::int, NULL::int, NULL::text, NULL::bytea, NULL::text, NULL::smallint,
            NULL::text, NULL::text, NULL::timestamptz,
            greatest(0, extract(epoch FROM v_next - now()) * 1000)::float8;
    END IF;
    IF v_ring THEN
        PERFORM pg_notify(p_channel, '');
    END IF;
END $$;

-- Letters that wait again, as new messages.
CREATE OR REPLACE FUNCTION queue_redrive(p_queue int, p_channel text, p_ids text[]) RETURNS bigint
LANGUAGE plpgsql"""
    + _PLANS
    + """AS $$
DECLARE
    v_letters queue_dead_letter[];
BEGIN
    WITH gone AS (
        DELETE FROM queue_dead_letter d WHERE d.queue_no = p_queue AND d.id = ANY (p_ids) RETURNING d.*
    )
    SELECT array_agg(g::queue_dead_letter ORDER BY g.failed_at, g.id) INTO v_letters FROM gone g;
    IF v_letters IS NULL THEN
        RETURN 0;
    END IF;
    PERFORM queue_send(
        p_queue, p_channel, NULL, interval '0', array_agg(l.id ORDER BY l.failed_at, l.id),
        array_agg(l.body ORDER BY l.failed_at, l.id), array_agg(l.headers::text ORDER BY l.failed_at, l.id),
        array_agg(l.rank ORDER BY l.failed_at, l.id), array_agg(l.key ORDER BY l.failed_at, l.id),
        array_agg(NULL::text), array_agg(0::bigint), array_agg(l.enqueued_at ORDER BY l.failed_at, l.id))
    FROM unnest(v_letters) l;
    RETURN cardinality(v_letters);
END $$;
"""
)

MIGRATIONS: Final = (_TABLES + _FUNCTIONS,)
"""The steps, in their order. `{schema}` is the schema, quoted."""
