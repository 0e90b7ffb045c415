-- What people read. The columns of these views stay as they are whatever becomes of the tables below them; new ones are
-- added at the end.

-- JSON of a record; what jsonb cannot hold (NUL, a lone surrogate) comes as the text that it is.
CREATE FUNCTION @schema@.saga_json(p_text text) RETURNS jsonb
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS $$
BEGIN
    RETURN p_text::jsonb;
EXCEPTION WHEN data_exception OR program_limit_exceeded THEN
    RETURN to_jsonb(p_text);
END $$;

CREATE VIEW @schema@.saga_instances AS
SELECT t.saga_id, t.correlation_key, t.run, t.status, t.revision, @schema@.saga_json(t.state) AS state,
    @schema@.saga_json(t.result) AS result, t.reason, t.is_paused, t.last_message_type, t.created_at, t.updated_at,
    t.ended_at
FROM @schema@.saga_runtime_state t
UNION ALL
SELECT h.saga_id, h.correlation_key, 0, 'pending', 0, NULL, NULL, NULL, false, NULL, h.created_at, h.created_at, NULL
FROM @schema@.saga_runtime_correlation h WHERE h.awaits_start AND h.run = 0;

-- The runs of one correlation key, by its hash: at once, however many there are.
CREATE FUNCTION @schema@.saga_instance(p_saga_id text, p_correlation_key text) RETURNS SETOF @schema@.saga_instances
LANGUAGE sql STABLE AS $$
    SELECT t.saga_id, t.correlation_key, t.run, t.status, t.revision, @schema@.saga_json(t.state),
        @schema@.saga_json(t.result), t.reason, t.is_paused, t.last_message_type, t.created_at, t.updated_at, t.ended_at
    FROM @schema@.saga_runtime_correlation h JOIN @schema@.saga_runtime_state t ON t.pk = h.pk
    WHERE h.key_hash = sha256(convert_to(p_saga_id, 'UTF8') || '\x00'::bytea || convert_to(p_correlation_key, 'UTF8'))
    ORDER BY t.run
$$;

CREATE VIEW @schema@.saga_history AS
SELECT t.saga_id, t.correlation_key, e.run, e.entry_no, e.revision, e.disposition, e.message_type, e.message_id,
    e.status, e.reason, e.at
FROM @schema@.saga_runtime_transition e JOIN @schema@.saga_runtime_state t ON t.pk = e.pk AND t.run = e.run;

CREATE VIEW @schema@.saga_timers AS
SELECT id, saga_id, correlation_key, run, name, message_type, due_at FROM @schema@.saga_runtime_timer;

CREATE VIEW @schema@.saga_outbox AS
SELECT part AS partition, seq AS number, saga_id, correlation_key, run, target, effect_key, attempt, due_at, created_at,
    last_error, dead_letter_id
FROM @schema@.saga_runtime_outbox;

CREATE VIEW @schema@.saga_dead_letters AS
SELECT id, saga_id, correlation_key, message_type, code, reason, attempts, at FROM @schema@.saga_runtime_dead_letter;

CREATE VIEW @schema@.saga_workers AS
SELECT holder, host, started_at, expires_at, expires_at > clock_timestamp() AS is_alive
FROM @schema@.saga_runtime_worker WHERE expires_at > '-infinity';
