-- Messages that somebody's own transaction has left for us. They are there from the moment that it commits; nothing of
-- ours is locked before, so that it may stay open for as long as it likes.
CREATE TABLE @schema@.saga_runtime_left (
    id              bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    part            int NOT NULL,
    saga_id         text NOT NULL,
    correlation_key text NOT NULL,
    message_type    text NOT NULL,
    message_id      text NOT NULL,
    accepted_at     timestamptz NOT NULL,
    v               bytea NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_cost_delay = 0);
