"""What the Redis broker has the server do: Lua scripts, each of which runs as one step.

The keys of a queue, behind a prefix of its own; `n` is the number by which a message is known inside:

    seq        string   the last number that was given
    msg        hash     n -> the message
    meta       hash     n -> rank:attempt:epoch
    ready      zset     n by rank and arrival: those that wait
    later      zset     n by the moment at which they are due (milliseconds of the server's clock)
    leased     zset     n by the moment at which their lease is over
    lane       hash     n -> key, for messages that have one
    heads      set      keys of which a message is in ready, later or leased
    lane:<key> list     n of those that wait behind it
    due        hash     n -> when one of these is due, if it is delayed
    dedupe:<id> string  a deduplication id that still counts
    dead       hash     id -> dead letter; `deadorder` (zset) has the moments at which they failed
    wake       list     a token for each consumer that may find something

A script that fails half-way is not rolled back, so none can: what may be refused (a queue or a memory that is full) is
refused before or by the first write, and every command after it is one that cannot fail. The script of consumers begins
with a command that needs no memory; the server then lets it go on, for it makes room.
"""

from __future__ import annotations

from typing import Final

__all__ = ["DEPTH", "DISCARD", "EXCHANGE", "FULL", "REDRIVE", "RENEW", "SEND"]

FULL: Final = "QUEUEFULL"

_PRELUDE: Final = """
local P = KEYS[1]
local call = redis.call
local t = call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local BAND = 17592186044416

local function place(n, rank, arrival)
  call('ZADD', P .. 'ready', string.format('%.0f', rank * BAND + arrival), n)
end

local function wait(n, rank)
  place(n, rank, call('INCR', P .. 'seq'))
end

local function ring(times)
  local there = call('LLEN', P .. 'wake')
  while there < 16 and times > 0 do
    call('RPUSH', P .. 'wake', '1')
    there = there + 1
    times = times - 1
  end
end

local function parts(meta)
  local rank, attempt, epoch = string.match(meta, '(%d+):(%d+):(%d+)')
  return tonumber(rank), tonumber(attempt), tonumber(epoch)
end

-- A message that is new here: `due` is 0, or a moment to come.
local function enter(n, body, rank, key, due)
  call('HSET', P .. 'msg', n, body)
  call('HSET', P .. 'meta', n, rank .. ':0:0')
  if key ~= '' then
    call('HSET', P .. 'lane', n, key)
    if call('SADD', P .. 'heads', key) == 0 then
      call('RPUSH', P .. 'lane:' .. key, n)
      if due > 0 then call('HSET', P .. 'due', n, string.format('%.0f', due)) end
      return
    end
  end
  if due > 0 then
    call('ZADD', P .. 'later', string.format('%.0f', due), n)
  else
    place(n, rank, n)
  end
end
"""

# ARGV: how many may be there (0: any number), milliseconds that a deduplication id counts; then of each message its
# body, rank, delay, key and deduplication id. Returns 1 or 0 for each.
SEND: Final = (
    _PRELUDE
    + """
local count = (#ARGV - 2) / 5
local most = tonumber(ARGV[1])
local stored, new, seen = {}, 0, {}
for i = 1, count do
  local id = ARGV[2 + i * 5]
  stored[i] = 1
  if id ~= '' then
    if seen[id] or call('EXISTS', P .. 'dedupe:' .. id) == 1 then stored[i] = 0 end
    seen[id] = true
  end
  new = new + stored[i]
end
if new == 0 then return stored end
if most > 0 and call('HLEN', P .. 'msg') + new > most then return redis.error_reply('QUEUEFULL') end
local n = call('INCRBY', P .. 'seq', new) - new
for i = 1, count do
  if stored[i] == 1 then
    n = n + 1
    local at = 2 + (i - 1) * 5
    local delay = tonumber(ARGV[at + 3])
    enter(n, ARGV[at + 1], tonumber(ARGV[at + 2]), ARGV[at + 4], delay > 0 and now + delay or 0)
    if ARGV[at + 5] ~= '' then call('SET', P .. 'dedupe:' .. ARGV[at + 5], '1', 'PX', ARGV[2]) end
  end
end
ring(new)
return stored
"""
)

# ARGV: how many to take, milliseconds of a lease; then of each settlement its kind (a, r, l, b), n, epoch, and three
# more: the delay of a retry; id, letter and moment of a dead letter.
EXCHANGE: Final = (
    _PRELUDE
    + """
call('DEL', P .. 'none')
local limit, lease = tonumber(ARGV[1]), tonumber(ARGV[2])
local stale = {}

local function go_on(key)
  local n = call('LPOP', P .. 'lane:' .. key)
  if not n then
    call('SREM', P .. 'heads', key)
    return
  end
  local due = call('HGET', P .. 'due', n)
  if due then call('HDEL', P .. 'due', n) end
  if due and tonumber(due) > now then
    call('ZADD', P .. 'later', due, n)
  else
    wait(n, (parts(call('HGET', P .. 'meta', n))))
  end
end

local gone, keyed = {}, call('EXISTS', P .. 'lane') == 1
for i = 3, #ARGV, 6 do
  local kind, n, epoch = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2])
  local meta = call('HGET', P .. 'meta', n)
  local rank, attempt, current
  if meta then rank, attempt, current = parts(meta) end
  if current ~= epoch or call('ZREM', P .. 'leased', n) == 0 then
    stale[#stale + 1] = n
    stale[#stale + 1] = epoch
  elseif kind == 'r' then
    local delay = tonumber(ARGV[i + 3])
    if delay > 0 then
      call('ZADD', P .. 'later', string.format('%.0f', now + delay), n)
    else
      wait(n, rank)
    end
  elseif kind == 'l' then
    call('HSET', P .. 'meta', n, rank .. ':' .. (attempt - 1) .. ':' .. current)
    place(n, rank, tonumber(n))
  else
    if kind == 'b' then
      call('HSET', P .. 'dead', ARGV[i + 3], ARGV[i + 4])
      call('ZADD', P .. 'deadorder', ARGV[i + 5], ARGV[i + 3])
    end
    gone[#gone + 1] = n
  end
end
if #gone > 0 then
  if keyed then
    local keys = call('HMGET', P .. 'lane', unpack(gone))
    for i = 1, #gone do
      if keys[i] then
        call('HDEL', P .. 'lane', gone[i])
        go_on(keys[i])
      end
    end
  end
  call('HDEL', P .. 'msg', unpack(gone))
  call('HDEL', P .. 'meta', unpack(gone))
end

for _, n in ipairs(call('ZRANGEBYSCORE', P .. 'leased', '-inf', now, 'LIMIT', 0, 256)) do
  local rank, attempt, epoch = parts(call('HGET', P .. 'meta', n))
  -- Another epoch, so that whoever had it is late from now on.
  call('HSET', P .. 'meta', n, rank .. ':' .. attempt .. ':' .. (epoch + 1))
  wait(n, rank)
  call('ZREM', P .. 'leased', n)
end
for _, n in ipairs(call('ZRANGEBYSCORE', P .. 'later', '-inf', now, 'LIMIT', 0, 256)) do
  wait(n, (parts(call('HGET', P .. 'meta', n))))
  call('ZREM', P .. 'later', n)
end

local taken = {}
if limit > 0 then
  local ns = call('ZRANGE', P .. 'ready', 0, limit - 1)
  if #ns > 0 then
    local metas, bodies = call('HMGET', P .. 'meta', unpack(ns)), call('HMGET', P .. 'msg', unpack(ns))
    local until_, leases, changed = string.format('%.0f', now + lease), {}, {}
    for i, n in ipairs(ns) do
      local rank, attempt, epoch = parts(metas[i])
      leases[i * 2 - 1], leases[i * 2] = until_, n
      changed[i * 2 - 1], changed[i * 2] = n, rank .. ':' .. (attempt + 1) .. ':' .. (epoch + 1)
      local at = #taken
      taken[at + 1], taken[at + 2], taken[at + 3], taken[at + 4] = n, epoch + 1, attempt + 1, bodies[i]
    end
    call('ZADD', P .. 'leased', unpack(leases))
    call('HSET', P .. 'meta', unpack(changed))
    call('ZREM', P .. 'ready', unpack(ns))
  end
end
if call('EXISTS', P .. 'ready') == 1 then ring(1) end

local next_at = -1
for _, set in ipairs({'later', 'leased'}) do
  local first = call('ZRANGE', P .. set, 0, 0, 'WITHSCORES')
  if #first > 0 then
    local in_ms = math.max(tonumber(first[2]) - now, 0)
    if next_at < 0 or in_ms < next_at then next_at = in_ms end
  end
end
return {stale, taken, next_at}
"""
)

# ARGV: milliseconds of a lease; then n and epoch of each. Returns those that are over.
RENEW: Final = (
    _PRELUDE
    + """
call('DEL', P .. 'none')
local lost = {}
for i = 2, #ARGV, 2 do
  local n, epoch = ARGV[i], tonumber(ARGV[i + 1])
  local meta = call('HGET', P .. 'meta', n)
  local _, _, current
  if meta then _, _, current = parts(meta) end
  if current == epoch and call('ZSCORE', P .. 'leased', n) then
    call('ZADD', P .. 'leased', string.format('%.0f', now + tonumber(ARGV[1])), n)
  else
    lost[#lost + 1] = n
    lost[#lost + 1] = epoch
  end
end
return lost
"""
)

# Returns how many there are that are not dead, that are delayed, that are leased, and that are dead.
DEPTH: Final = """
local P = KEYS[1]
local call = redis.call
return {call('HLEN', P .. 'msg'), call('ZCARD', P .. 'later'), call('ZCARD', P .. 'leased'), call('HLEN', P .. 'dead')}
"""

# ARGV: of each letter its id, the message, its rank and its key. Returns how many there were.
REDRIVE: Final = (
    _PRELUDE
    + """
local count = 0
for i = 1, #ARGV, 4 do
  if call('HEXISTS', P .. 'dead', ARGV[i]) == 1 then
    enter(call('INCR', P .. 'seq'), ARGV[i + 1], tonumber(ARGV[i + 2]), ARGV[i + 3], 0)
    call('HDEL', P .. 'dead', ARGV[i])
    call('ZREM', P .. 'deadorder', ARGV[i])
    count = count + 1
  end
end
ring(count)
return count
"""
)

# ARGV: ids of letters. Returns how many there were.
DISCARD: Final = (
    _PRELUDE
    + """
call('ZREM', P .. 'deadorder', unpack(ARGV))
return call('HDEL', P .. 'dead', unpack(ARGV))
"""
)
