-- The first schema. @schema@ stands for the schema that the store lives in.
--
-- `v` holds a record as the engine writes it (msgpack, an array that may grow at its end), so that records can have new
-- fields without a migration. The columns beside it are for people and for indexes; the engine reads only `v`, keys, and
-- the versionstamp `s`, where there is one.

CREATE TABLE @schema@.saga_runtime_meta (
    name  text PRIMARY KEY,
    value text NOT NULL
);

-- Numbers. A number that a commit has taken and not used leaves a gap, except those of `saga_runtime_counter`.
CREATE SEQUENCE @schema@.saga_runtime_versionstamp;
CREATE SEQUENCE @schema@.saga_runtime_inbox_number;
CREATE SEQUENCE @schema@.saga_runtime_outbox_number;
CREATE TABLE @schema@.saga_runtime_counter (
    name text PRIMARY KEY,
    n    bigint NOT NULL
) WITH (fillfactor = 50);

-- Rows that are few, or read by machines only: members and leases, the registry, schedules, job runs. `k` is packed so
-- that it sorts as the tuple does (sagaloom.kv.packing).
CREATE TABLE @schema@.saga_runtime_row (
    tbl text COLLATE "C" NOT NULL,
    k   bytea NOT NULL,
    v   bytea NOT NULL,
    s   bigint NOT NULL,
    PRIMARY KEY (tbl, k)
) WITH (fillfactor = 80, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);

-- One row for each correlation key.
CREATE TABLE @schema@.saga_runtime_correlation (
    key_hash        bytea PRIMARY KEY,
    saga_id         text COLLATE "C" NOT NULL,
    correlation_key text COLLATE "C" NOT NULL,
    pk              bigint NOT NULL,
    part            int NOT NULL,
    run             int NOT NULL,
    awaits_start    boolean NOT NULL,
    created_at      timestamptz NOT NULL,
    v               bytea NOT NULL,
    s               bigint NOT NULL
) WITH (fillfactor = 90);
CREATE INDEX saga_runtime_correlation_pending ON @schema@.saga_runtime_correlation (saga_id, created_at, pk)
    WHERE awaits_start AND run = 0;

-- One row for each run.
CREATE TABLE @schema@.saga_runtime_state (
    pk                bigint NOT NULL,
    run               int NOT NULL,
    saga_id           text COLLATE "C" NOT NULL,
    correlation_key   text COLLATE "C" NOT NULL,
    status            text COLLATE "C" NOT NULL,
    revision          int NOT NULL,
    state             text NOT NULL,
    result            text,
    reason            text,
    last_message_type text,
    is_paused         boolean NOT NULL,
    created_at        timestamptz NOT NULL,
    updated_at        timestamptz NOT NULL,
    ended_at          timestamptz,
    v                 bytea NOT NULL,
    PRIMARY KEY (pk, run)
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_cost_delay = 0);
CREATE INDEX saga_runtime_state_newest ON @schema@.saga_runtime_state (saga_id, status, created_at, pk, run);

-- One row for each message that a run has met.
CREATE TABLE @schema@.saga_runtime_transition (
    pk           bigint NOT NULL,
    run          int NOT NULL,
    entry_no     int NOT NULL,
    revision     int NOT NULL,
    disposition  text NOT NULL,
    message_type text NOT NULL,
    message_id   text NOT NULL,
    status       text NOT NULL,
    reason       text,
    at           timestamptz NOT NULL,
    v            bytea NOT NULL,
    PRIMARY KEY (pk, run, entry_no)
);

-- What was seen, by instance and idempotency key.
CREATE TABLE @schema@.saga_runtime_dedupe (
    pk   bigint NOT NULL,
    hash bytea NOT NULL,
    v    bytea NOT NULL,
    PRIMARY KEY (pk, hash)
);

-- What waits. A row is deleted by the commit that is done with it, so these tables are small and their rows short-lived.
CREATE TABLE @schema@.saga_runtime_inbox (
    part            int NOT NULL,
    seq             bigint NOT NULL,
    saga_id         text NOT NULL,
    correlation_key text NOT NULL,
    message_type    text NOT NULL,
    message_id      text NOT NULL,
    attempt         int NOT NULL,
    due_at          timestamptz,
    accepted_at     timestamptz NOT NULL,
    last_error      text,
    v               bytea NOT NULL,
    PRIMARY KEY (part, seq)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_cost_delay = 0);

CREATE TABLE @schema@.saga_runtime_outbox (
    part            int NOT NULL,
    seq             bigint NOT NULL,
    saga_id         text NOT NULL,
    correlation_key text NOT NULL,
    run             int NOT NULL,
    target          text NOT NULL,
    effect_key      text NOT NULL,
    attempt         int NOT NULL,
    due_at          timestamptz,
    created_at      timestamptz NOT NULL,
    last_error      text,
    dead_letter_id  text,
    v               bytea NOT NULL,
    PRIMARY KEY (part, seq)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_cost_delay = 0);

CREATE TABLE @schema@.saga_runtime_timer (
    due             bigint NOT NULL, -- microseconds since 1970
    id              text COLLATE "C" NOT NULL,
    saga_id         text NOT NULL,
    correlation_key text NOT NULL,
    run             int,
    name            text,
    message_type    text NOT NULL,
    due_at          timestamptz NOT NULL,
    v               bytea NOT NULL,
    PRIMARY KEY (due, id)
) WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);

CREATE TABLE @schema@.saga_runtime_dead_letter (
    id              text COLLATE "C" PRIMARY KEY,
    saga_id         text COLLATE "C" NOT NULL,
    correlation_key text COLLATE "C" NOT NULL,
    key_hash        bytea NOT NULL,
    message_type    text NOT NULL,
    code            text NOT NULL,
    reason          text NOT NULL,
    attempts        int NOT NULL,
    at              timestamptz NOT NULL,
    v               bytea NOT NULL,
    s               bigint NOT NULL
);
CREATE INDEX saga_runtime_dead_letter_saga ON @schema@.saga_runtime_dead_letter (saga_id, id);
CREATE INDEX saga_runtime_dead_letter_key ON @schema@.saga_runtime_dead_letter (key_hash, id);

-- One row for each run that another one has spawned. The status is part of its place: 0 live, 1 completed, 2 failed,
-- 3 cancelled.
CREATE TABLE @schema@.saga_runtime_child (
    pk              bigint NOT NULL, -- of the parent
    parent_run      int NOT NULL,
    status          int NOT NULL,
    revision        int NOT NULL,
    position        int NOT NULL,
    saga_id         text NOT NULL,
    correlation_key text NOT NULL,
    run             int NOT NULL,
    spawned_at      timestamptz NOT NULL,
    ended_at        timestamptz,
    v               bytea NOT NULL,
    PRIMARY KEY (pk, parent_run, status, revision, position)
) WITH (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_cost_delay = 0);

-- One row for each place that a saga has under a concurrency key and that a message holds.
CREATE TABLE @schema@.saga_runtime_slot (
    saga_id         text COLLATE "C" NOT NULL,
    concurrency_key text COLLATE "C" NOT NULL,
    number          int NOT NULL,
    correlation_key text NOT NULL,
    message_id      text NOT NULL,
    taken_at        timestamptz NOT NULL,
    v               bytea NOT NULL,
    PRIMARY KEY (saga_id, concurrency_key, number)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_cost_delay = 0);

-- The feed: a row for each commit that shows something, with the number of its first event as soon as it has one.
CREATE TABLE @schema@.saga_runtime_feed (
    id   bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    base bigint,
    n    int NOT NULL,
    v    bytea NOT NULL
) WITH (fillfactor = 95, autovacuum_vacuum_cost_delay = 0);
CREATE UNIQUE INDEX saga_runtime_feed_base ON @schema@.saga_runtime_feed (base) WHERE base IS NOT NULL;
CREATE INDEX saga_runtime_feed_unnumbered ON @schema@.saga_runtime_feed (id) WHERE base IS NULL;
CREATE TABLE @schema@.saga_runtime_feed_head (
    one  int PRIMARY KEY DEFAULT 1 CHECK (one = 1),
    next bigint NOT NULL
) WITH (fillfactor = 10);
INSERT INTO @schema@.saga_runtime_feed_head (next) VALUES (1);

-- For each partition a versionstamp, which every commit renews that brings messages to it for somebody else.
CREATE TABLE @schema@.saga_runtime_arrivals (
    part int PRIMARY KEY,
    s    bigint NOT NULL
) WITH (fillfactor = 10);
INSERT INTO @schema@.saga_runtime_arrivals SELECT part, 0 FROM generate_series(0, 63) AS part;

-- Who writes: until when each is believed to live, by this database's clock, and what its last commit got.
CREATE TABLE @schema@.saga_runtime_worker (
    holder      text COLLATE "C" PRIMARY KEY,
    host        text NOT NULL,
    started_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at  timestamptz NOT NULL,
    commit_no   bigint NOT NULL DEFAULT 0,
    stamp       bigint NOT NULL DEFAULT 0,
    inbox_base  bigint NOT NULL DEFAULT 0,
    outbox_base bigint NOT NULL DEFAULT 0,
    feed_base   bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 10, autovacuum_vacuum_cost_delay = 0);


-- The next n consecutive numbers of a sequence. Others may take some in between: then these are gaps, and we try again.
CREATE FUNCTION @schema@.saga_runtime_numbers(p_sequence regclass, p_n int) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    v_first bigint;
    v_last bigint;
BEGIN
    IF p_n = 0 THEN
        RETURN 0;
    END IF;
    FOR i IN 1..1000 LOOP
        v_first := nextval(p_sequence);
        IF p_n = 1 THEN
            RETURN v_first;
        END IF;
        SELECT max(nextval(p_sequence)) INTO v_last FROM generate_series(2, p_n);
        IF v_last - v_first = p_n - 1 THEN
            RETURN v_first;
        END IF;
    END LOOP;
    RAISE EXCEPTION 'others keep taking numbers of %', p_sequence USING ERRCODE = 'serialization_failure';
END $$;


-- How safe the commit of this very statement is: on the disk at least, and with p_replicated on a synchronous standby,
-- too. It never takes away what the server is set to.
CREATE FUNCTION @schema@.saga_runtime_durability(p_replicated boolean) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_is text := current_setting('synchronous_commit');
BEGIN
    IF p_replicated AND current_setting('synchronous_standby_names') = '' THEN
        RAISE EXCEPTION 'no synchronous standby is named any more' USING ERRCODE = '55000';
    END IF;
    IF p_replicated AND v_is IN ('off', 'local', 'remote_write') THEN
        PERFORM set_config('synchronous_commit', 'on', true);
    ELSIF v_is = 'off' THEN
        PERFORM set_config('synchronous_commit', 'local', true);
    END IF;
END $$;


-- Numbers the commits of the feed that have none, in their order. Whoever holds the head does it alone; with p_waits
-- somebody else is waited for, without it nothing is done then. Returns whether it was done.
CREATE FUNCTION @schema@.saga_runtime_number_feed(p_waits boolean) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
    v_next bigint;
    v_end bigint;
BEGIN
    IF p_waits THEN
        IF NOT EXISTS (SELECT FROM @schema@.saga_runtime_feed WHERE base IS NULL) THEN
            RETURN true;
        END IF;
        SELECT next INTO v_next FROM @schema@.saga_runtime_feed_head FOR NO KEY UPDATE;
    ELSE
        SELECT next INTO v_next FROM @schema@.saga_runtime_feed_head FOR NO KEY UPDATE SKIP LOCKED;
        IF NOT FOUND THEN
            RETURN false;
        END IF;
    END IF;
    WITH waiting AS (
        SELECT id, v_next + sum(n) OVER (ORDER BY id) - n AS base, n
        FROM @schema@.saga_runtime_feed WHERE base IS NULL
    ), numbered AS (
        UPDATE @schema@.saga_runtime_feed f SET base = w.base FROM waiting w WHERE f.id = w.id
    )
    SELECT max(base + n) INTO v_end FROM waiting;
    IF v_end IS NOT NULL THEN
        UPDATE @schema@.saga_runtime_feed_head SET next = v_end;
    END IF;
    RETURN true;
END $$;


-- One commit of rows of saga_runtime_row. Of a conflict it tells the checks and inserts that failed, by their position,
-- and has written nothing. A check without a versionstamp asks for absence: such a key is written and deleted again, so
-- that nobody else can write it before we have ended.
CREATE FUNCTION @schema@.saga_runtime_commit_rows(
    p_check_tbl text[], p_check_k bytea[], p_check_s bigint[],
    p_delete_tbl text[], p_delete_k bytea[],
    p_insert_tbl text[], p_insert_k bytea[], p_insert_v bytea[],
    p_put_tbl text[], p_put_k bytea[], p_put_v bytea[],
    p_counter text[], p_count int[],
    OUT stamp bigint, OUT bases bigint[], OUT failed_checks bigint[], OUT failed_inserts bigint[]
)
LANGUAGE plpgsql
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_seqscan = off SET jit = off SET lock_timeout = '4s'
AS $$
DECLARE
    v_n bigint;
BEGIN
    IF cardinality(p_check_k) > 0 THEN
        SELECT array_agg(c.no ORDER BY c.no) INTO failed_checks
        FROM unnest(p_check_tbl, p_check_k, p_check_s) WITH ORDINALITY AS c(tbl, k, s, no)
        LEFT JOIN LATERAL (
            SELECT r.s FROM @schema@.saga_runtime_row r WHERE r.tbl = c.tbl AND r.k = c.k FOR NO KEY UPDATE
        ) r ON true
        WHERE r.s IS DISTINCT FROM c.s;
    END IF;
    IF cardinality(p_insert_k) > 0 THEN
        SELECT array_agg(c.no ORDER BY c.no) INTO failed_inserts
        FROM unnest(p_insert_tbl, p_insert_k) WITH ORDINALITY AS c(tbl, k, no)
        CROSS JOIN LATERAL (
            SELECT r.s FROM @schema@.saga_runtime_row r WHERE r.tbl = c.tbl AND r.k = c.k LIMIT 1
        ) r
        WHERE NOT EXISTS (SELECT FROM unnest(p_delete_tbl, p_delete_k) AS d(tbl, k) WHERE d.tbl = c.tbl AND d.k = c.k);
    END IF;
    IF failed_checks IS NOT NULL OR failed_inserts IS NOT NULL THEN
        RETURN;
    END IF;

    stamp := nextval('@schema@.saga_runtime_versionstamp');
    IF array_position(p_check_s, NULL) IS NOT NULL THEN
        INSERT INTO @schema@.saga_runtime_row
            SELECT DISTINCT c.tbl, c.k, ''::bytea, stamp FROM unnest(p_check_tbl, p_check_k, p_check_s) AS c(tbl, k, s)
            WHERE c.s IS NULL;
        DELETE FROM @schema@.saga_runtime_row r
            USING unnest(p_check_tbl, p_check_k, p_check_s) AS c(tbl, k, s)
            WHERE c.s IS NULL AND r.tbl = c.tbl AND r.k = c.k;
    END IF;
    bases := '{}';
    FOR i IN 1..cardinality(p_counter) LOOP
        INSERT INTO @schema@.saga_runtime_counter AS c VALUES (p_counter[i], p_count[i])
            ON CONFLICT (name) DO UPDATE SET n = c.n + excluded.n RETURNING n INTO v_n;
        bases := bases || (v_n - p_count[i] + 1);
    END LOOP;
    IF cardinality(p_delete_k) > 0 THEN
        DELETE FROM @schema@.saga_runtime_row r USING unnest(p_delete_tbl, p_delete_k) AS d(tbl, k)
            WHERE r.tbl = d.tbl AND r.k = d.k;
    END IF;
    IF cardinality(p_insert_k) > 0 THEN
        INSERT INTO @schema@.saga_runtime_row
            SELECT w.tbl, w.k, w.v, stamp FROM unnest(p_insert_tbl, p_insert_k, p_insert_v) AS w(tbl, k, v);
    END IF;
    IF cardinality(p_put_k) > 0 THEN
        INSERT INTO @schema@.saga_runtime_row
            SELECT w.tbl, w.k, w.v, stamp FROM unnest(p_put_tbl, p_put_k, p_put_v) AS w(tbl, k, v)
            ON CONFLICT (tbl, k) DO UPDATE SET v = excluded.v, s = excluded.s;
    END IF;
END $$;


-- A commit of a batch of units is one statement that calls the next three functions in their order; they are three
-- because a function has at most 100 arguments. The first tells how it ends: 'committed', or 'member', 'arrivals' (in
-- failed_parts), 'checks' or 'marks' when a condition does not hold, and then nothing is written. Other conflicts raise
-- unique_violation or no_data_found, and the caller looks what is there.
CREATE FUNCTION @schema@.saga_runtime_begin(
    p_member bytea, p_member_stamp bigint,
    -- what is decided of messages that older ones may have been brought before: inbox rows of the same key between these
    -- numbers, except those of the writer itself, are in its way
    p_older_part int[], p_older_saga text[], p_older_key text[], p_older_above bigint[], p_older_below bigint[],
    p_own_seq bigint[],
    p_head_check_hash bytea[], p_head_check_s bigint[],
    p_letter_check_id text[], p_letter_check_s bigint[],
    -- dedupe: must be absent, deletes, inserts
    p_mark_absent_pk bigint[], p_mark_absent_hash bytea[],
    p_mark_gone_pk bigint[], p_mark_gone_hash bytea[],
    p_mark_pk bigint[], p_mark_hash bytea[], p_mark_v bytea[],
    OUT outcome text, OUT older bigint[], OUT stamp bigint
)
LANGUAGE plpgsql
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_seqscan = off SET jit = off
SET plan_cache_mode = force_generic_plan SET lock_timeout = '4s'
AS $$
DECLARE
    v_count bigint;
BEGIN
    -- Conditions. The row of the writer first: whoever takes its partitions away waits for us, or we find it changed.
    PERFORM FROM @schema@.saga_runtime_row WHERE tbl = 'member' AND k = p_member AND s = p_member_stamp FOR SHARE;
    IF NOT FOUND THEN
        outcome := 'member';
        RETURN;
    END IF;
    IF cardinality(p_older_part) > 0 THEN
        -- A plain look, without a lock: what was acknowledged before we were asked is visible by now.
        SELECT array_agg(c.no ORDER BY c.no) INTO older
        FROM unnest(p_older_part, p_older_saga, p_older_key, p_older_above, p_older_below)
            WITH ORDINALITY AS c(part, saga, key, above, below, no)
        CROSS JOIN LATERAL (
            SELECT FROM @schema@.saga_runtime_inbox i
            WHERE i.part = c.part AND i.seq > c.above AND i.seq < c.below
              AND i.correlation_key = c.key AND i.saga_id = c.saga AND i.seq <> ALL (coalesce(p_own_seq, '{}'))
            LIMIT 1
        ) i
        WHERE c.above >= 0 -- or nothing has been read there, and there is something that others have brought
           OR EXISTS (SELECT FROM @schema@.saga_runtime_arrivals a WHERE a.part = c.part AND a.s <> 0);
        IF older IS NOT NULL THEN
            outcome := 'older';
            RETURN;
        END IF;
    END IF;
    IF cardinality(p_head_check_hash) > 0 THEN
        SELECT count(*) INTO v_count
        FROM unnest(p_head_check_hash, p_head_check_s) AS c(hash, s)
        CROSS JOIN LATERAL (
            SELECT h.s FROM @schema@.saga_runtime_correlation h WHERE h.key_hash = c.hash FOR NO KEY UPDATE
        ) h
        WHERE h.s = c.s OR c.s IS NULL; -- without a versionstamp it is only locked
        IF v_count <> cardinality(p_head_check_hash) THEN
            outcome := 'checks';
            RETURN;
        END IF;
    END IF;
    IF cardinality(p_letter_check_id) > 0 THEN
        SELECT count(*) INTO v_count
        FROM unnest(p_letter_check_id, p_letter_check_s) AS c(id, s)
        CROSS JOIN LATERAL (
            SELECT d.s FROM @schema@.saga_runtime_dead_letter d WHERE d.id = c.id FOR NO KEY UPDATE
        ) d
        WHERE d.s = c.s;
        IF v_count <> cardinality(p_letter_check_id) THEN
            outcome := 'checks';
            RETURN;
        END IF;
    END IF;
    IF cardinality(p_mark_absent_pk) > 0 THEN
        PERFORM FROM unnest(p_mark_absent_pk, p_mark_absent_hash) AS c(pk, hash)
        CROSS JOIN LATERAL (
            SELECT FROM @schema@.saga_runtime_dedupe m WHERE m.pk = c.pk AND m.hash = c.hash LIMIT 1
        ) m;
        IF FOUND THEN
            outcome := 'marks';
            RETURN;
        END IF;
    END IF;
    IF cardinality(p_mark_pk) > 0 THEN
        -- Before anything else is written, for these are what nearly every refused commit fails at.
        IF cardinality(p_mark_gone_pk) > 0 THEN
            PERFORM FROM unnest(p_mark_pk, p_mark_hash) AS c(pk, hash)
            CROSS JOIN LATERAL (
                SELECT FROM @schema@.saga_runtime_dedupe m WHERE m.pk = c.pk AND m.hash = c.hash LIMIT 1
            ) m
            WHERE NOT EXISTS (
                SELECT FROM unnest(p_mark_gone_pk, p_mark_gone_hash) AS g(pk, hash) WHERE g.pk = c.pk AND g.hash = c.hash
            );
            IF FOUND THEN
                outcome := 'marks';
                RETURN;
            END IF;
            DELETE FROM @schema@.saga_runtime_dedupe m
            USING unnest(p_mark_gone_pk, p_mark_gone_hash) AS g(pk, hash) WHERE m.pk = g.pk AND m.hash = g.hash;
            INSERT INTO @schema@.saga_runtime_dedupe SELECT * FROM unnest(p_mark_pk, p_mark_hash, p_mark_v);
        ELSE
            WITH written AS (
                INSERT INTO @schema@.saga_runtime_dedupe SELECT * FROM unnest(p_mark_pk, p_mark_hash, p_mark_v)
                ON CONFLICT DO NOTHING RETURNING pk, hash
            )
            SELECT count(*) INTO v_count FROM written;
            IF v_count <> cardinality(p_mark_pk) THEN
                -- Those that were there have another writer's stamp: a system column tells ours.
                DELETE FROM @schema@.saga_runtime_dedupe m
                USING unnest(p_mark_pk, p_mark_hash) AS c(pk, hash)
                WHERE m.pk = c.pk AND m.hash = c.hash AND m.xmin = pg_current_xact_id()::xid;
                outcome := 'marks';
                RETURN;
            END IF;
        END IF;
    ELSIF cardinality(p_mark_gone_pk) > 0 THEN
        DELETE FROM @schema@.saga_runtime_dedupe m
        USING unnest(p_mark_gone_pk, p_mark_gone_hash) AS g(pk, hash) WHERE m.pk = g.pk AND m.hash = g.hash;
    END IF;

    stamp := nextval('@schema@.saga_runtime_versionstamp');
    outcome := 'committed';
END $$;


-- Heads, runs and history. p_stamp is null when the commit has ended before.
CREATE FUNCTION @schema@.saga_runtime_write_instances(
    p_stamp bigint,
    -- correlation: inserts, updates
    p_head_new_hash bytea[], p_head_new_saga text[], p_head_new_key text[], p_head_new_pk bigint[],
    p_head_new_part int[], p_head_new_run int[], p_head_new_awaits boolean[], p_head_new_at timestamptz[],
    p_head_new_v bytea[],
    p_head_hash bytea[], p_head_run int[], p_head_awaits boolean[], p_head_v bytea[],
    -- state: inserts, updates
    p_run_new_pk bigint[], p_run_new_run int[], p_run_new_saga text[], p_run_new_key text[], p_run_new_status text[],
    p_run_new_revision int[], p_run_new_state text[], p_run_new_result text[], p_run_new_reason text[],
    p_run_new_type text[], p_run_new_paused boolean[], p_run_new_created timestamptz[], p_run_new_updated timestamptz[],
    p_run_new_ended timestamptz[], p_run_new_v bytea[],
    p_run_pk bigint[], p_run_run int[], p_run_status text[], p_run_revision int[], p_run_state text[],
    p_run_result text[], p_run_reason text[], p_run_type text[], p_run_paused boolean[], p_run_updated timestamptz[],
    p_run_ended timestamptz[], p_run_v bytea[],
    -- transition: inserts
    p_entry_pk bigint[], p_entry_run int[], p_entry_no int[], p_entry_revision int[], p_entry_disposition text[],
    p_entry_type text[], p_entry_id text[], p_entry_status text[], p_entry_reason text[], p_entry_at timestamptz[],
    p_entry_v bytea[]
) RETURNS bigint
LANGUAGE plpgsql
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_seqscan = off SET jit = off
SET plan_cache_mode = force_generic_plan SET lock_timeout = '4s'
AS $$
DECLARE
    v_count bigint;
BEGIN
    IF p_stamp IS NULL THEN
        RETURN NULL;
    END IF;
    IF cardinality(p_head_new_hash) > 0 THEN
        INSERT INTO @schema@.saga_runtime_correlation
            (key_hash, saga_id, correlation_key, pk, part, run, awaits_start, created_at, v, s)
        SELECT h.*, p_stamp FROM unnest(
            p_head_new_hash, p_head_new_saga, p_head_new_key, p_head_new_pk, p_head_new_part, p_head_new_run,
            p_head_new_awaits, p_head_new_at, p_head_new_v
        ) AS h;
    END IF;
    IF cardinality(p_head_hash) > 0 THEN
        UPDATE @schema@.saga_runtime_correlation h
        SET run = c.run, awaits_start = c.awaits, v = c.v, s = p_stamp
        FROM unnest(p_head_hash, p_head_run, p_head_awaits, p_head_v) AS c(hash, run, awaits, v)
        WHERE h.key_hash = c.hash;
        GET DIAGNOSTICS v_count = ROW_COUNT;
        IF v_count <> cardinality(p_head_hash) THEN
            RAISE EXCEPTION 'a correlation head is gone' USING ERRCODE = 'no_data_found';
        END IF;
    END IF;
    IF cardinality(p_run_new_pk) > 0 THEN
        INSERT INTO @schema@.saga_runtime_state
            (pk, run, saga_id, correlation_key, status, revision, state, result, reason, last_message_type, is_paused,
             created_at, updated_at, ended_at, v)
        SELECT * FROM unnest(
            p_run_new_pk, p_run_new_run, p_run_new_saga, p_run_new_key, p_run_new_status, p_run_new_revision,
            p_run_new_state, p_run_new_result, p_run_new_reason, p_run_new_type, p_run_new_paused, p_run_new_created,
            p_run_new_updated, p_run_new_ended, p_run_new_v
        );
    END IF;
    IF cardinality(p_run_pk) > 0 THEN
        UPDATE @schema@.saga_runtime_state t
        SET status = c.status, revision = c.revision, state = c.state, result = c.result, reason = c.reason,
            last_message_type = c.type, is_paused = c.paused, updated_at = c.updated, ended_at = c.ended, v = c.v
        FROM unnest(
            p_run_pk, p_run_run, p_run_status, p_run_revision, p_run_state, p_run_result, p_run_reason, p_run_type,
            p_run_paused, p_run_updated, p_run_ended, p_run_v
        ) AS c(pk, run, status, revision, state, result, reason, type, paused, updated, ended, v)
        WHERE t.pk = c.pk AND t.run = c.run;
        GET DIAGNOSTICS v_count = ROW_COUNT;
        IF v_count <> cardinality(p_run_pk) THEN
            RAISE EXCEPTION 'a run is gone' USING ERRCODE = 'no_data_found';
        END IF;
    END IF;
    IF cardinality(p_entry_pk) > 0 THEN
        INSERT INTO @schema@.saga_runtime_transition
            (pk, run, entry_no, revision, disposition, message_type, message_id, status, reason, at, v)
        SELECT * FROM unnest(
            p_entry_pk, p_entry_run, p_entry_no, p_entry_revision, p_entry_disposition, p_entry_type, p_entry_id,
            p_entry_status, p_entry_reason, p_entry_at, p_entry_v
        );
    END IF;
    RETURN p_stamp;
END $$;


-- What waits and what is shown, and the note of the commit itself. p_stamp is null when the commit has ended before.
CREATE FUNCTION @schema@.saga_runtime_write_rows(
    p_stamp bigint, p_holder text, p_commit_no bigint,
    p_part_put int[],
    p_saga_seen bytea[],
    -- inbox: inserts, updates, deletes
    p_inbox_new_part int[], p_inbox_new_saga text[], p_inbox_new_key text[], p_inbox_new_type text[],
    p_inbox_new_id text[], p_inbox_new_attempt int[], p_inbox_new_due timestamptz[], p_inbox_new_accepted timestamptz[],
    p_inbox_new_error text[], p_inbox_new_v bytea[],
    p_inbox_part int[], p_inbox_seq bigint[], p_inbox_attempt int[], p_inbox_due timestamptz[], p_inbox_error text[],
    p_inbox_v bytea[],
    p_inbox_gone_part int[], p_inbox_gone_seq bigint[],
    -- outbox: inserts, updates, deletes
    p_outbox_new_part int[], p_outbox_new_saga text[], p_outbox_new_key text[], p_outbox_new_run int[],
    p_outbox_new_target text[], p_outbox_new_effect text[], p_outbox_new_created timestamptz[], p_outbox_new_v bytea[],
    p_outbox_part int[], p_outbox_seq bigint[], p_outbox_attempt int[], p_outbox_due timestamptz[],
    p_outbox_error text[], p_outbox_letter text[], p_outbox_v bytea[],
    p_outbox_gone_part int[], p_outbox_gone_seq bigint[],
    -- timer: puts, deletes
    p_timer_due bigint[], p_timer_id text[], p_timer_saga text[], p_timer_key text[], p_timer_run int[],
    p_timer_name text[], p_timer_type text[], p_timer_at timestamptz[], p_timer_v bytea[],
    p_timer_gone_due bigint[], p_timer_gone_id text[],
    -- dead letters: puts, deletes
    p_letter_id text[], p_letter_saga text[], p_letter_key text[], p_letter_hash bytea[], p_letter_type text[],
    p_letter_code text[], p_letter_reason text[], p_letter_attempts int[], p_letter_at timestamptz[], p_letter_v bytea[],
    p_letter_gone_id text[],
    -- children: puts, deletes
    p_child_pk bigint[], p_child_parent_run int[], p_child_status int[], p_child_revision int[], p_child_position int[],
    p_child_saga text[], p_child_key text[], p_child_run int[], p_child_spawned timestamptz[],
    p_child_ended timestamptz[], p_child_v bytea[],
    p_child_gone_pk bigint[], p_child_gone_parent_run int[], p_child_gone_status int[], p_child_gone_revision int[],
    p_child_gone_position int[],
    -- slots: inserts, deletes
    p_slot_saga text[], p_slot_concurrency text[], p_slot_number int[], p_slot_key text[], p_slot_message text[],
    p_slot_taken timestamptz[], p_slot_v bytea[],
    p_slot_gone_saga text[], p_slot_gone_concurrency text[], p_slot_gone_number int[],
    -- the feed
    p_feed_n int, p_feed_v bytea,
    OUT inbox_base bigint, OUT outbox_base bigint, OUT feed_base bigint
)
LANGUAGE plpgsql
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_seqscan = off SET jit = off
SET plan_cache_mode = force_generic_plan SET lock_timeout = '4s'
AS $$
DECLARE
    v_count bigint;
BEGIN
    inbox_base := 0;
    outbox_base := 0;
    feed_base := 0;
    IF p_stamp IS NULL THEN
        RETURN;
    END IF;
    IF cardinality(p_inbox_gone_part) > 0 THEN
        DELETE FROM @schema@.saga_runtime_inbox t
        USING unnest(p_inbox_gone_part, p_inbox_gone_seq) AS g(part, seq) WHERE t.part = g.part AND t.seq = g.seq;
        GET DIAGNOSTICS v_count = ROW_COUNT;
        IF v_count <> cardinality(p_inbox_gone_part) THEN
            RAISE EXCEPTION 'an inbox row is gone' USING ERRCODE = 'no_data_found';
        END IF;
    END IF;
    IF cardinality(p_inbox_part) > 0 THEN
        UPDATE @schema@.saga_runtime_inbox t
        SET attempt = c.attempt, due_at = c.due, last_error = c.error, v = c.v
        FROM unnest(p_inbox_part, p_inbox_seq, p_inbox_attempt, p_inbox_due, p_inbox_error, p_inbox_v)
            AS c(part, seq, attempt, due, error, v)
        WHERE t.part = c.part AND t.seq = c.seq;
        GET DIAGNOSTICS v_count = ROW_COUNT;
        IF v_count <> cardinality(p_inbox_part) THEN
            RAISE EXCEPTION 'an inbox row is gone' USING ERRCODE = 'no_data_found';
        END IF;
    END IF;
    IF cardinality(p_outbox_gone_part) > 0 THEN
        DELETE FROM @schema@.saga_runtime_outbox t
        USING unnest(p_outbox_gone_part, p_outbox_gone_seq) AS g(part, seq) WHERE t.part = g.part AND t.seq = g.seq;
        GET DIAGNOSTICS v_count = ROW_COUNT;
        IF v_count <> cardinality(p_outbox_gone_part) THEN
            RAISE EXCEPTION 'an outbox row is gone' USING ERRCODE = 'no_data_found';
        END IF;
    END IF;
    IF cardinality(p_outbox_part) > 0 THEN
        UPDATE @schema@.saga_runtime_outbox t
        SET attempt = c.attempt, due_at = c.due, last_error = c.error, dead_letter_id = c.letter, v = c.v
        FROM unnest(
            p_outbox_part, p_outbox_seq, p_outbox_attempt, p_outbox_due, p_outbox_error, p_outbox_letter, p_outbox_v
        ) AS c(part, seq, attempt, due, error, letter, v)
        WHERE t.part = c.part AND t.seq = c.seq;
        GET DIAGNOSTICS v_count = ROW_COUNT;
        IF v_count <> cardinality(p_outbox_part) THEN
            RAISE EXCEPTION 'an outbox row is gone' USING ERRCODE = 'no_data_found';
        END IF;
    END IF;
    IF cardinality(p_timer_gone_due) > 0 THEN
        DELETE FROM @schema@.saga_runtime_timer t
        USING unnest(p_timer_gone_due, p_timer_gone_id) AS g(due, id) WHERE t.due = g.due AND t.id = g.id;
    END IF;
    IF cardinality(p_timer_due) > 0 THEN
        INSERT INTO @schema@.saga_runtime_timer
            (due, id, saga_id, correlation_key, run, name, message_type, due_at, v)
        SELECT * FROM unnest(
            p_timer_due, p_timer_id, p_timer_saga, p_timer_key, p_timer_run, p_timer_name, p_timer_type, p_timer_at,
            p_timer_v
        )
        ON CONFLICT (due, id) DO UPDATE SET v = excluded.v, name = excluded.name, message_type = excluded.message_type;
    END IF;
    IF cardinality(p_letter_gone_id) > 0 THEN
        DELETE FROM @schema@.saga_runtime_dead_letter t USING unnest(p_letter_gone_id) AS g(id) WHERE t.id = g.id;
    END IF;
    IF cardinality(p_letter_id) > 0 THEN
        INSERT INTO @schema@.saga_runtime_dead_letter
            (id, saga_id, correlation_key, key_hash, message_type, code, reason, attempts, at, v, s)
        SELECT d.*, p_stamp FROM unnest(
            p_letter_id, p_letter_saga, p_letter_key, p_letter_hash, p_letter_type, p_letter_code, p_letter_reason,
            p_letter_attempts, p_letter_at, p_letter_v
        ) AS d
        ON CONFLICT (id) DO UPDATE
        SET reason = excluded.reason, code = excluded.code, attempts = excluded.attempts, at = excluded.at,
            v = excluded.v, s = excluded.s;
    END IF;
    IF cardinality(p_slot_gone_saga) > 0 THEN
        DELETE FROM @schema@.saga_runtime_slot t
        USING unnest(p_slot_gone_saga, p_slot_gone_concurrency, p_slot_gone_number) AS g(saga, concurrency, number)
        WHERE t.saga_id = g.saga AND t.concurrency_key = g.concurrency AND t.number = g.number;
    END IF;
    IF cardinality(p_slot_saga) > 0 THEN
        INSERT INTO @schema@.saga_runtime_slot
            (saga_id, concurrency_key, number, correlation_key, message_id, taken_at, v)
        SELECT * FROM unnest(
            p_slot_saga, p_slot_concurrency, p_slot_number, p_slot_key, p_slot_message, p_slot_taken, p_slot_v
        );
    END IF;
    IF cardinality(p_child_gone_pk) > 0 THEN
        DELETE FROM @schema@.saga_runtime_child t
        USING unnest(
            p_child_gone_pk, p_child_gone_parent_run, p_child_gone_status, p_child_gone_revision, p_child_gone_position
        ) AS g(pk, parent_run, status, revision, position)
        WHERE t.pk = g.pk AND t.parent_run = g.parent_run AND t.status = g.status AND t.revision = g.revision
          AND t.position = g.position;
    END IF;
    IF cardinality(p_child_pk) > 0 THEN
        INSERT INTO @schema@.saga_runtime_child
            (pk, parent_run, status, revision, position, saga_id, correlation_key, run, spawned_at, ended_at, v)
        SELECT * FROM unnest(
            p_child_pk, p_child_parent_run, p_child_status, p_child_revision, p_child_position, p_child_saga,
            p_child_key, p_child_run, p_child_spawned, p_child_ended, p_child_v
        )
        ON CONFLICT (pk, parent_run, status, revision, position) DO UPDATE
        SET saga_id = excluded.saga_id, correlation_key = excluded.correlation_key, run = excluded.run,
            ended_at = excluded.ended_at, v = excluded.v;
    END IF;
    IF cardinality(p_saga_seen) > 0 THEN
        INSERT INTO @schema@.saga_runtime_row SELECT 'saga_seen', k, '', p_stamp FROM unnest(p_saga_seen) AS k
        ON CONFLICT DO NOTHING;
    END IF;

    -- Numbers last: nothing is refused any more, so they have gaps only where a server has died.
    IF cardinality(p_inbox_new_part) > 0 THEN
        -- Behind the lock of their partitions, so that they become visible in their order; as late as can be, for it is
        -- held until the commit is on the disk. All locks in one order, so that two commits cannot wait for each other.
        PERFORM FROM (SELECT DISTINCT part FROM unnest(p_inbox_new_part) AS part ORDER BY part) c
        CROSS JOIN LATERAL (
            SELECT FROM @schema@.saga_runtime_arrivals a WHERE a.part = c.part FOR NO KEY UPDATE
        ) a;
        IF cardinality(p_part_put) > 0 THEN
            UPDATE @schema@.saga_runtime_arrivals a SET s = p_stamp
            FROM unnest(p_part_put) AS c(part) WHERE a.part = c.part;
        END IF;
        inbox_base := @schema@.saga_runtime_numbers('@schema@.saga_runtime_inbox_number', cardinality(p_inbox_new_part));
        INSERT INTO @schema@.saga_runtime_inbox
            (part, seq, saga_id, correlation_key, message_type, message_id, attempt, due_at, accepted_at, last_error, v)
        SELECT c.part, inbox_base + c.no - 1, c.saga, c.key, c.type, c.id, c.attempt, c.due, c.accepted, c.error, c.v
        FROM unnest(
            p_inbox_new_part, p_inbox_new_saga, p_inbox_new_key, p_inbox_new_type, p_inbox_new_id, p_inbox_new_attempt,
            p_inbox_new_due, p_inbox_new_accepted, p_inbox_new_error, p_inbox_new_v
        ) WITH ORDINALITY AS c(part, saga, key, type, id, attempt, due, accepted, error, v, no);
    END IF;
    IF cardinality(p_outbox_new_part) > 0 THEN
        outbox_base :=
            @schema@.saga_runtime_numbers('@schema@.saga_runtime_outbox_number', cardinality(p_outbox_new_part));
        INSERT INTO @schema@.saga_runtime_outbox
            (part, seq, saga_id, correlation_key, run, target, effect_key, attempt, created_at, v)
        SELECT c.part, outbox_base + c.no - 1, c.saga, c.key, c.run, c.target, c.effect, 0, c.created, c.v
        FROM unnest(
            p_outbox_new_part, p_outbox_new_saga, p_outbox_new_key, p_outbox_new_run, p_outbox_new_target,
            p_outbox_new_effect, p_outbox_new_created, p_outbox_new_v
        ) WITH ORDINALITY AS c(part, saga, key, run, target, effect, created, v, no);
    END IF;
    IF p_feed_n > 0 THEN
        IF @schema@.saga_runtime_number_feed(false) THEN
            UPDATE @schema@.saga_runtime_feed_head SET next = next + p_feed_n RETURNING next - p_feed_n INTO feed_base;
            INSERT INTO @schema@.saga_runtime_feed (base, n, v) VALUES (feed_base, p_feed_n, p_feed_v);
        ELSE
            INSERT INTO @schema@.saga_runtime_feed (n, v) VALUES (p_feed_n, p_feed_v);
        END IF;
    END IF;
    UPDATE @schema@.saga_runtime_worker w
    SET commit_no = p_commit_no, stamp = p_stamp, inbox_base = saga_runtime_write_rows.inbox_base,
        outbox_base = saga_runtime_write_rows.outbox_base, feed_base = saga_runtime_write_rows.feed_base
    WHERE w.holder = p_holder;
    IF NOT FOUND THEN
        INSERT INTO @schema@.saga_runtime_worker
            (holder, host, expires_at, commit_no, stamp, inbox_base, outbox_base, feed_base)
        VALUES (p_holder, '', '-infinity', p_commit_no, p_stamp, inbox_base, outbox_base, feed_base);
    END IF;
END $$;
