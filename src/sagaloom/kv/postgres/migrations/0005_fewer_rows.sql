-- A commit that does less where several processes bring messages to each other: it writes one row of arrivals instead of
-- one for each partition, holds their locks for a shorter time, and numbers the feed only when something is without a
-- number. It takes the same arguments and the same locks as before, so that a process of the version before calls it, too,
-- and one of its commits that is under way meanwhile is in nobody's way.
-- It tells how it ends: 'committed', or 'member', 'older' (and which), 'checks' or 'marks' when a condition does not hold,
-- and then nothing is written. Other conflicts raise unique_violation or no_data_found, and the caller looks what is
-- there. What a commit has none of is null.
CREATE OR REPLACE FUNCTION @schema@.saga_runtime_commit(
    p_member bytea, p_member_stamp bigint, p_holder text, p_commit_no bigint,
    -- what is decided of messages that older ones may have been brought before: inbox rows of the same key between these
    -- numbers, except those of the writer itself, are in its way
    p_older @schema@.saga_runtime_older[], p_own bigint[],
    p_head_checks @schema@.saga_runtime_head_check[], p_letter_checks @schema@.saga_runtime_letter_check[],
    -- dedupe: must be absent, deletes, inserts
    p_marks_absent @schema@.saga_runtime_mark_place[], p_marks_gone @schema@.saga_runtime_mark_place[],
    p_marks @schema@.saga_runtime_mark[],
    p_heads_new @schema@.saga_runtime_head_new[], p_heads @schema@.saga_runtime_head_change[],
    p_runs_new @schema@.saga_runtime_run_new[], p_runs @schema@.saga_runtime_run_change[],
    p_entries @schema@.saga_runtime_entry[],
    p_part_puts int[], p_sagas_seen bytea[],
    p_inbox_new @schema@.saga_runtime_inbox_new[], p_inbox @schema@.saga_runtime_inbox_change[],
    p_inbox_gone @schema@.saga_runtime_number[],
    p_outbox_new @schema@.saga_runtime_outbox_new[], p_outbox @schema@.saga_runtime_outbox_change[],
    p_outbox_gone @schema@.saga_runtime_number[],
    p_timers @schema@.saga_runtime_timer_put[], p_timers_gone @schema@.saga_runtime_timer_place[],
    p_letters @schema@.saga_runtime_letter_put[], p_letters_gone text[],
    p_children @schema@.saga_runtime_child_put[], p_children_gone @schema@.saga_runtime_child_place[],
    p_slots @schema@.saga_runtime_slot_new[], p_slots_gone @schema@.saga_runtime_slot_place[],
    p_feed_n int, p_feed_v bytea,
    OUT outcome text, OUT older bigint[], OUT stamp bigint,
    OUT inbox_base bigint, OUT outbox_base bigint, OUT feed_base bigint
)
LANGUAGE plpgsql
SET enable_hashjoin = off SET enable_mergejoin = off SET enable_seqscan = off SET jit = off
SET plan_cache_mode = force_generic_plan SET lock_timeout = '4s'
AS $$
DECLARE
    v_count bigint;
    v_stamp bigint;
    v_next bigint;
BEGIN
    inbox_base := 0;
    outbox_base := 0;
    feed_base := 0;

    -- Conditions. The row of the writer first: whoever takes its partitions away waits for us, or we find it changed.
    PERFORM FROM @schema@.saga_runtime_row WHERE tbl = 'member' AND k = p_member AND s = p_member_stamp FOR SHARE;
    IF NOT FOUND THEN
        outcome := 'member';
        RETURN;
    END IF;
    IF cardinality(p_older) > 0 THEN
        -- A plain look, without a lock: what was acknowledged before we were asked is visible by now.
        SELECT array_agg(c.ordinality ORDER BY c.ordinality) INTO older
        FROM unnest(p_older) WITH ORDINALITY AS c
        CROSS JOIN LATERAL (
            SELECT FROM @schema@.saga_runtime_inbox i
            WHERE i.part = c.part AND i.seq > c.above AND i.seq < c.below
              AND i.correlation_key = c.key AND i.saga_id = c.saga AND i.seq <> ALL (coalesce(p_own, '{}'))
            LIMIT 1
        ) i
        WHERE c.above >= 0 -- or nothing has been read there, and there is something that others have brought
           OR EXISTS (SELECT FROM @schema@.saga_runtime_arrivals a WHERE a.part = c.part AND a.s <> 0);
        IF older IS NOT NULL THEN
            outcome := 'older';
            RETURN;
        END IF;
    END IF;
    IF cardinality(p_head_checks) > 0 THEN
        SELECT count(*) INTO v_count
        FROM unnest(p_head_checks) AS c
        CROSS JOIN LATERAL (
            SELECT h.s FROM @schema@.saga_runtime_correlation h WHERE h.key_hash = c.hash FOR NO KEY UPDATE
        ) h
        WHERE h.s = c.s OR c.s IS NULL; -- without a versionstamp it is only locked
        IF v_count <> cardinality(p_head_checks) THEN
            outcome := 'checks';
            RETURN;
        END IF;
    END IF;
    IF cardinality(p_letter_checks) > 0 THEN
        SELECT count(*) INTO v_count
        FROM unnest(p_letter_checks) AS c
        CROSS JOIN LATERAL (
            SELECT d.s FROM @schema@.saga_runtime_dead_letter d WHERE d.id = c.id FOR NO KEY UPDATE
        ) d
        WHERE d.s = c.s;
        IF v_count <> cardinality(p_letter_checks) THEN
            outcome := 'checks';
            RETURN;
        END IF;
    END IF;
    IF cardinality(p_marks_absent) > 0 THEN
        PERFORM FROM unnest(p_marks_absent) AS c
        CROSS JOIN LATERAL (
            SELECT FROM @schema@.saga_runtime_dedupe m WHERE m.pk = c.pk AND m.hash = c.hash LIMIT 1
        ) m;
        IF FOUND THEN
            outcome := 'marks';
            RETURN;
        END IF;
    END IF;
    IF cardinality(p_marks) > 0 THEN
        -- Before anything else is written, for these are what nearly every refused commit fails at.
        IF cardinality(p_marks_gone) > 0 THEN
            PERFORM FROM unnest(p_marks) AS c
            CROSS JOIN LATERAL (
                SELECT FROM @schema@.saga_runtime_dedupe m WHERE m.pk = c.pk AND m.hash = c.hash LIMIT 1
            ) m
            WHERE NOT EXISTS (SELECT FROM unnest(p_marks_gone) AS g WHERE g.pk = c.pk AND g.hash = c.hash);
            IF FOUND THEN
                outcome := 'marks';
                RETURN;
            END IF;
            DELETE FROM @schema@.saga_runtime_dedupe m
            USING unnest(p_marks_gone) AS g WHERE m.pk = g.pk AND m.hash = g.hash;
            INSERT INTO @schema@.saga_runtime_dedupe SELECT c.* FROM unnest(p_marks) AS c;
        ELSE
            INSERT INTO @schema@.saga_runtime_dedupe SELECT c.* FROM unnest(p_marks) AS c ON CONFLICT DO NOTHING;
            GET DIAGNOSTICS v_count = ROW_COUNT;
            IF v_count <> cardinality(p_marks) THEN
                -- Those that were there have another writer's stamp: a system column tells ours.
                DELETE FROM @schema@.saga_runtime_dedupe m
                USING unnest(p_marks) AS c
                WHERE m.pk = c.pk AND m.hash = c.hash AND m.xmin = pg_current_xact_id()::xid;
                outcome := 'marks';
                RETURN;
            END IF;
        END IF;
    ELSIF cardinality(p_marks_gone) > 0 THEN
        DELETE FROM @schema@.saga_runtime_dedupe m
        USING unnest(p_marks_gone) AS g WHERE m.pk = g.pk AND m.hash = g.hash;
    END IF;

    v_stamp := nextval('@schema@.saga_runtime_versionstamp');

    -- Heads, runs and history.
    IF cardinality(p_heads_new) > 0 THEN
        INSERT INTO @schema@.saga_runtime_correlation
            (key_hash, saga_id, correlation_key, pk, part, run, awaits_start, created_at, v, s)
        SELECT c.*, v_stamp FROM unnest(p_heads_new) AS c;
    END IF;
    IF cardinality(p_heads) > 0 THEN
        UPDATE @schema@.saga_runtime_correlation h
        SET run = c.run, awaits_start = c.awaits, v = c.v, s = v_stamp
        FROM unnest(p_heads) AS c WHERE h.key_hash = c.hash;
        GET DIAGNOSTICS v_count = ROW_COUNT;
        IF v_count <> cardinality(p_heads) THEN
            RAISE EXCEPTION 'a correlation head is gone' USING ERRCODE = 'no_data_found';
        END IF;
    END IF;
    IF cardinality(p_runs_new) > 0 THEN
        INSERT INTO @schema@.saga_runtime_state
            (pk, run, saga_id, correlation_key, status, revision, state, result, reason, last_message_type, is_paused,
             created_at, updated_at, ended_at, v)
        SELECT c.* FROM unnest(p_runs_new) AS c;
    END IF;
    IF cardinality(p_runs) > 0 THEN
        UPDATE @schema@.saga_runtime_state t
        SET status = c.status, revision = c.revision, state = c.state, result = c.result, reason = c.reason,
            last_message_type = c.type, is_paused = c.paused, updated_at = c.updated, ended_at = c.ended, v = c.v
        FROM unnest(p_runs) AS c WHERE t.pk = c.pk AND t.run = c.run;
        GET DIAGNOSTICS v_count = ROW_COUNT;
        IF v_count <> cardinality(p_runs) THEN
            RAISE EXCEPTION 'a run is gone' USING ERRCODE = 'no_data_found';
        END IF;
    END IF;
    IF cardinality(p_entries) > 0 THEN
        INSERT INTO @schema@.saga_runtime_transition
            (pk, run, entry_no, revision, disposition, message_type, message_id, status, reason, at, v)
        SELECT c.* FROM unnest(p_entries) AS c;
    END IF;

    -- What waits and what is shown.
    IF cardinality(p_inbox_gone) > 0 THEN
        DELETE FROM @schema@.saga_runtime_inbox t
        USING unnest(p_inbox_gone) AS g WHERE t.part = g.part AND t.seq = g.seq;
        GET DIAGNOSTICS v_count = ROW_COUNT;
        IF v_count <> cardinality(p_inbox_gone) THEN
            RAISE EXCEPTION 'an inbox row is gone' USING ERRCODE = 'no_data_found';
        END IF;
    END IF;
    IF cardinality(p_inbox) > 0 THEN
        UPDATE @schema@.saga_runtime_inbox t
        SET attempt = c.attempt, due_at = c.due, last_error = c.error, v = c.v
        FROM unnest(p_inbox) AS c WHERE t.part = c.part AND t.seq = c.seq;
        GET DIAGNOSTICS v_count = ROW_COUNT;
        IF v_count <> cardinality(p_inbox) THEN
            RAISE EXCEPTION 'an inbox row is gone' USING ERRCODE = 'no_data_found';
        END IF;
    END IF;
    IF cardinality(p_outbox_gone) > 0 THEN
        DELETE FROM @schema@.saga_runtime_outbox t
        USING unnest(p_outbox_gone) AS g WHERE t.part = g.part AND t.seq = g.seq;
        GET DIAGNOSTICS v_count = ROW_COUNT;
        IF v_count <> cardinality(p_outbox_gone) THEN
            RAISE EXCEPTION 'an outbox row is gone' USING ERRCODE = 'no_data_found';
        END IF;
    END IF;
    IF cardinality(p_outbox) > 0 THEN
        UPDATE @schema@.saga_runtime_outbox t
        SET attempt = c.attempt, due_at = c.due, last_error = c.error, dead_letter_id = c.letter, v = c.v
        FROM unnest(p_outbox) AS c WHERE t.part = c.part AND t.seq = c.seq;
        GET DIAGNOSTICS v_count = ROW_COUNT;
        IF v_count <> cardinality(p_outbox) THEN
            RAISE EXCEPTION 'an outbox row is gone' USING ERRCODE = 'no_data_found';
        END IF;
    END IF;
    IF num_nonnulls(p_timers, p_timers_gone, p_letters, p_letters_gone, p_children, p_children_gone, p_slots, p_slots_gone,
        p_sagas_seen) > 0 THEN -- most commits have none of these
        IF cardinality(p_timers_gone) > 0 THEN
            DELETE FROM @schema@.saga_runtime_timer t
            USING unnest(p_timers_gone) AS g WHERE t.due = g.due AND t.id = g.id;
        END IF;
        IF cardinality(p_timers) > 0 THEN
            INSERT INTO @schema@.saga_runtime_timer
                (due, id, saga_id, correlation_key, run, name, message_type, due_at, v)
            SELECT c.* FROM unnest(p_timers) AS c
            ON CONFLICT (due, id) DO UPDATE SET v = excluded.v, name = excluded.name, message_type = excluded.message_type;
        END IF;
        IF cardinality(p_letters_gone) > 0 THEN
            DELETE FROM @schema@.saga_runtime_dead_letter t USING unnest(p_letters_gone) AS g(id) WHERE t.id = g.id;
        END IF;
        IF cardinality(p_letters) > 0 THEN
            INSERT INTO @schema@.saga_runtime_dead_letter
                (id, saga_id, correlation_key, key_hash, message_type, code, reason, attempts, at, v, s)
            SELECT c.*, v_stamp FROM unnest(p_letters) AS c
            ON CONFLICT (id) DO UPDATE
            SET reason = excluded.reason, code = excluded.code, attempts = excluded.attempts, at = excluded.at,
                v = excluded.v, s = excluded.s;
        END IF;
        IF cardinality(p_slots_gone) > 0 THEN
            DELETE FROM @schema@.saga_runtime_slot t
            USING unnest(p_slots_gone) AS g
            WHERE t.saga_id = g.saga AND t.concurrency_key = g.concurrency AND t.number = g.number;
        END IF;
        IF cardinality(p_slots) > 0 THEN
            INSERT INTO @schema@.saga_runtime_slot
                (saga_id, concurrency_key, number, correlation_key, message_id, taken_at, v)
            SELECT c.* FROM unnest(p_slots) AS c;
        END IF;
        IF cardinality(p_children_gone) > 0 THEN
            DELETE FROM @schema@.saga_runtime_child t
            USING unnest(p_children_gone) AS g
            WHERE t.pk = g.pk AND t.parent_run = g.parent_run AND t.status = g.status AND t.revision = g.revision
              AND t.position = g.position;
        END IF;
        IF cardinality(p_children) > 0 THEN
            INSERT INTO @schema@.saga_runtime_child
                (pk, parent_run, status, revision, position, saga_id, correlation_key, run, spawned_at, ended_at, v)
            SELECT c.* FROM unnest(p_children) AS c
            ON CONFLICT (pk, parent_run, status, revision, position) DO UPDATE
            SET saga_id = excluded.saga_id, correlation_key = excluded.correlation_key, run = excluded.run,
                ended_at = excluded.ended_at, v = excluded.v;
        END IF;
        IF cardinality(p_sagas_seen) > 0 THEN
            INSERT INTO @schema@.saga_runtime_row SELECT 'saga_seen', k, '', v_stamp FROM unnest(p_sagas_seen) AS k
            ON CONFLICT DO NOTHING;
        END IF;
    END IF;

    -- Numbers last: nothing is refused any more, so they have gaps only where a server has died.
    IF cardinality(p_outbox_new) > 0 THEN
        outbox_base := @schema@.saga_runtime_numbers('@schema@.saga_runtime_outbox_number', cardinality(p_outbox_new));
        INSERT INTO @schema@.saga_runtime_outbox
            (part, seq, saga_id, correlation_key, run, target, effect_key, attempt, created_at, v)
        SELECT c.part, saga_runtime_commit.outbox_base + c.ordinality - 1, c.saga, c.key, c.run, c.target, c.effect, 0,
            c.created, c.v
        FROM unnest(p_outbox_new) WITH ORDINALITY AS c;
    END IF;
    IF cardinality(p_inbox_new) > 0 THEN
        -- Behind the lock of their partitions, so that they become visible in their order; as late as can be, for it is
        -- held until the commit is on the disk. All locks in one order, so that two commits cannot wait for each other.
        PERFORM FROM (SELECT DISTINCT part FROM unnest(p_inbox_new) ORDER BY part) c
        CROSS JOIN LATERAL (
            SELECT FROM @schema@.saga_runtime_arrivals a WHERE a.part = c.part FOR NO KEY UPDATE
        ) a;
        IF cardinality(p_part_puts) > 0 THEN
            -- That something was ever brought there, and by one of the rows that something was brought just now. A row
            -- that has changed is looked at once more by everybody who has waited for it.
            UPDATE @schema@.saga_runtime_arrivals a SET s = v_stamp
            FROM unnest(p_part_puts) AS c(part) WHERE a.part = c.part AND (a.s = 0 OR a.part = p_part_puts[1]);
        END IF;
        inbox_base := @schema@.saga_runtime_numbers('@schema@.saga_runtime_inbox_number', cardinality(p_inbox_new));
        INSERT INTO @schema@.saga_runtime_inbox
            (part, seq, saga_id, correlation_key, message_type, message_id, attempt, due_at, accepted_at, last_error, v)
        SELECT c.part, saga_runtime_commit.inbox_base + c.ordinality - 1, c.saga, c.key, c.type, c.id, c.attempt, c.due,
            c.accepted, c.error, c.v
        FROM unnest(p_inbox_new) WITH ORDINALITY AS c;
    END IF;
    IF p_feed_n > 0 THEN
        -- As saga_runtime_number_feed(false) does, which finds something to number only after somebody came too late.
        SELECT next INTO v_next FROM @schema@.saga_runtime_feed_head FOR NO KEY UPDATE SKIP LOCKED;
        IF FOUND THEN
            IF EXISTS (SELECT FROM @schema@.saga_runtime_feed WHERE base IS NULL) THEN
                PERFORM @schema@.saga_runtime_number_feed(false);
                SELECT next INTO v_next FROM @schema@.saga_runtime_feed_head;
            END IF;
            feed_base := v_next;
            UPDATE @schema@.saga_runtime_feed_head SET next = v_next + p_feed_n;
            INSERT INTO @schema@.saga_runtime_feed (base, n, v) VALUES (feed_base, p_feed_n, p_feed_v);
        ELSE
            INSERT INTO @schema@.saga_runtime_feed (n, v) VALUES (p_feed_n, p_feed_v);
        END IF;
    END IF;

    -- The note of the commit itself.
    UPDATE @schema@.saga_runtime_worker w
    SET commit_no = p_commit_no, stamp = v_stamp, inbox_base = saga_runtime_commit.inbox_base,
        outbox_base = saga_runtime_commit.outbox_base, feed_base = saga_runtime_commit.feed_base
    WHERE w.holder = p_holder;
    IF NOT FOUND THEN
        INSERT INTO @schema@.saga_runtime_worker
            (holder, host, expires_at, commit_no, stamp, inbox_base, outbox_base, feed_base)
        VALUES (p_holder, '', '-infinity', p_commit_no, v_stamp, inbox_base, outbox_base, feed_base);
    END IF;
    stamp := v_stamp;
    outcome := 'committed';
END $$;
